"""COCO json -> packed arrays -> transforms -> padded batches. Knows nothing of models."""

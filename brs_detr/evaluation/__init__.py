"""COCO average precision and pictures of predictions. Knows nothing of models."""

"""COCO average precision and images of predictions. Knows nothing of models."""

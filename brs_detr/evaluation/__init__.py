"""COCO's average precision, LRP and the confusion matrix, independent of models."""

"""Conversion of official Co-DETR, Co-DINO and BRS-DETR checkpoints to the weights files of this project, and back."""

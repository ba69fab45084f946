"""Conversion of official Co-DETR and BRS-DETR checkpoints to the weights files of this project, and back."""

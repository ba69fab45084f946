"""Official Co-DETR and BRS-DETR checkpoints to ours and back."""

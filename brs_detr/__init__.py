"""BRS-DETR: Co-DETR trained with the Bucketed Rank & Sort loss."""

__version__ = "0.1.0"

"""Assignment of ground-truth boxes to predictions and anchors."""

"""Heads: RPN; one-stage RetinaNet, FoveaBox, ATSS, PAA, YOLACT, SOLOv2; second-stage RoI, Cascade R-CNN, mask."""

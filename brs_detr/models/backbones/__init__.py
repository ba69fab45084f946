"""Backbones: timm networks and Swin, with the feature maps that a detector reads, and their weights."""

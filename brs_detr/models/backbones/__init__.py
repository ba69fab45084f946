"""Backbones: timm networks and Swin cut to the feature maps that a detector reads, and their weights."""

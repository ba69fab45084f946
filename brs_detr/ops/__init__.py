"""Leaves of the house: boxes, anchors, batches of images, deformable attention. They import nothing of ours."""

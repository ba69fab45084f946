"""Building blocks: boxes, anchors, batches of images and targets, deformable attention sampling.

They import no other package of brs_detr.
"""

"""Training and evaluation loops, optimiser, checkpoints, logging: everything between a detector and a run."""

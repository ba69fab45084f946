"""Training and evaluation loops, optimizer, checkpoints, logging: everything between a detector and a run."""

"""The training loop, its checkpoints and logs, and prediction over a dataset."""

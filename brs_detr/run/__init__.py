"""Assembly of a run: datasets, detector and weights from a config, the launch, the output directory."""

"""The commands of `python -m brs_detr` that put several parts together; each has `add_arguments` and `run`."""

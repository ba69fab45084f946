"""Commands of `python -m brs_detr` that combine several packages; each module has `run`."""

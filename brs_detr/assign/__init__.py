"""Assigners: which prediction or anchor answers for which ground-truth box."""

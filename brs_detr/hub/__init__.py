"""Weights by name and from the Hugging Face hub: downloaded once, checked, and shared with a model card."""

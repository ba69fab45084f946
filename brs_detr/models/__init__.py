"""Detectors and their parts. Heads take the dataclass of their settings; nothing here imports the engine."""

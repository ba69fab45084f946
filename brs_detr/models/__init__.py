"""Detectors and their parts: plain `nn.Module`s that take plain values and know neither the config nor the engine."""

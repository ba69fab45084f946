"""The detector as an ONNX file for runtimes without torch, and the check that it computes the same."""

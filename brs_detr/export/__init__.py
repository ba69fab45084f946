"""ONNX export for runtimes without torch, and the comparison of the file with the detector."""

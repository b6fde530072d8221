"""Builders that write real networks as ONNX, with seeded random weights."""

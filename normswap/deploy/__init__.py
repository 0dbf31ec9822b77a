"""Shipping: to ONNX, with proof that it computes the same."""

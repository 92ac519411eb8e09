"""Trained models out of DMX: safetensors, ONNX, a model card; and in again, from a folder or the hub."""

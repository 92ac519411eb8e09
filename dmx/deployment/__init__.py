"""Trained models out of DMX: safetensors, ONNX, a model card; and in again, from a folder or the hub."""

# Here, where nothing heavy is imported, because the command line names them.
FORMATS = ("safetensors", "onnx")
OPSET = 18

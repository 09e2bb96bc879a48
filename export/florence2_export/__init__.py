"""A checkpoint becomes ONNX graphs and plans of TensorRT, each proved against it.

The command, training and the demo import it, and evaluation where it runs a checkpoint; it imports florence2.
"""

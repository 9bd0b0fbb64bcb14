"""The decode graph as an engine of TensorRT's."""

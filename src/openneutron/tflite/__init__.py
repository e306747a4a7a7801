"""The TFLite file format: the only room that knows its schema."""

from openneutron.tflite.outputs import returning
from openneutron.tflite.read import Model, Operator, Quantization, Subgraph, TensorInfo, read
from openneutron.tflite.write import write

__all__ = ["Model", "Operator", "Quantization", "Subgraph", "TensorInfo", "read", "returning", "write"]

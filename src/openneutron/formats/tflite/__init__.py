"""The TFLite file format: the only room that knows its schema."""

from openneutron.formats.tflite.outputs import returning
from openneutron.formats.tflite.read import Model, Operator, Quantization, Subgraph, TensorInfo, read
from openneutron.formats.tflite.write import write

__all__ = ["Model", "Operator", "Quantization", "Subgraph", "TensorInfo", "read", "returning", "write"]

"""Reads and writes TFLite files. Only this package imports the TFLite schema."""

from openneutron.formats.tflite.check import check, read_checked
from openneutron.formats.tflite.outputs import with_more_outputs
from openneutron.formats.tflite.read import FileTensor, Model, Operator, Quantization, Subgraph, read
from openneutron.formats.tflite.write import write

__all__ = [
    "FileTensor",
    "Model",
    "Operator",
    "Quantization",
    "Subgraph",
    "check",
    "read",
    "read_checked",
    "with_more_outputs",
    "write",
]

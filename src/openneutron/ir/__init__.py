"""The compiler's intermediate representation: TFLite operators over static, quantized NHWC tensors."""

from openneutron.ir.graph import Graph, Kind, Layout, Op, QParams, Tensor

__all__ = ["Graph", "Kind", "Layout", "Op", "QParams", "Tensor"]

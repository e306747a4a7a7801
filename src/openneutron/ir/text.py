"""Prints a graph as text with one line for each operator, for dumps and golden tests."""

from __future__ import annotations

from openneutron.ir.graph import Graph, QParams, Tensor

__all__ = ["dump"]


def dump(graph: Graph) -> str:
    """Returns one line for each input, operator and output.

    Tensors are numbered in the order of their first use. Names of constants begin with "c", of other tensors with "%".
    """
    names = {id(tensor): f"{'c' if tensor.data is not None else '%'}{i}" for i, tensor in enumerate(graph.tensors())}

    def typed(tensor: Tensor) -> str:
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        return f"{names[id(tensor)]}: {shape} {tensor.dtype}{_qparams_text(tensor.qparams)}"

    lines = [f"input {typed(tensor)}" for tensor in graph.inputs]
    for op in graph.ops:
        inputs = ", ".join(typed(tensor) if tensor.data is not None else names[id(tensor)] for tensor in op.inputs)
        attrs = "".join(f" {name}={_attr_text(value)}" for name, value in sorted(op.attrs.items()) if value != "NONE")
        lines.append(f"{typed(op.output)} = {op.kind.name}({inputs}){attrs}")
    lines += [f"output {names[id(tensor)]}" for tensor in graph.outputs]
    return "\n".join(lines) + "\n"


def _attr_text(value: object) -> str:
    return str(value).replace(" ", "")


def _qparams_text(qparams: QParams) -> str:
    if qparams.axis is not None:
        return f" q[axis {qparams.axis}]"
    return f" q({qparams.scale[0]:.6g}, {qparams.zero_point[0]})"

"""The graph as text: one line per operator, stable, for golden tests and for reading."""

from __future__ import annotations

from openneutron.ir.graph import Graph, QParams, Tensor

__all__ = ["dump"]


def dump(graph: Graph) -> str:
    """One line per input, operator and output; tensors are numbered in order of first use, constants marked."""
    names = {id(tensor): f"{'c' if tensor.data is not None else '%'}{i}" for i, tensor in enumerate(graph.tensors())}

    def typed(tensor: Tensor) -> str:
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        return f"{names[id(tensor)]}: {shape} {tensor.dtype}{_qparams(tensor.qparams)}"

    lines = [f"input {typed(tensor)}" for tensor in graph.inputs]
    for op in graph.ops:
        inputs = ", ".join(typed(tensor) if tensor.data is not None else names[id(tensor)] for tensor in op.inputs)
        attrs = "".join(f" {name}={_attribute(value)}" for name, value in sorted(op.attrs.items()) if value != "NONE")
        lines.append(f"{typed(op.output)} = {op.kind.name}({inputs}){attrs}")
    lines += [f"output {names[id(tensor)]}" for tensor in graph.outputs]
    return "\n".join(lines) + "\n"


def _attribute(value: object) -> str:
    return str(value).replace(" ", "")


def _qparams(qparams: QParams) -> str:
    if qparams.axis is not None:
        return f" q[axis {qparams.axis}]"
    return f" q({qparams.scale[0]:.6g}, {qparams.zero_point[0]})"

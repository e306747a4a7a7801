"""One operator lowered by itself: no export, no quantizer, no program, so that thousands of geometries are cheap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from ai_edge_litert.interpreter import Interpreter
from torch.fx import Graph as FxGraph
from torch.fx import Node

from openneutron.ir.build import optimize
from openneutron.ir.graph import Graph, Op, QParams, Tensor
from openneutron.ops import OPERATORS
from openneutron.ops.lowering import Lowering
from openneutron.ops.site import Site
from openneutron.ops.spec import OutputRule
from openneutron.targets import TARGETS
from openneutron.tflite.write import write

__all__ = ["Quantized", "deviation", "occurrence", "random_codes"]

Integers = npt.NDArray[Any]


class Quantized:
    """An operand: integers with their qparams, computed at run time unless `constant`."""

    def __init__(self, codes: Integers, qparams: QParams, *, constant: bool = False) -> None:
        self.codes, self.qparams, self.constant = codes, qparams, constant

    @property
    def real(self) -> torch.Tensor:
        """The real values, exactly enough to round them."""
        shape = [-1 if dim == self.qparams.axis else 1 for dim in range(self.codes.ndim)]
        scale, zero_point = (
            np.array(values).reshape(shape if self.qparams.axis is not None else ())
            for values in (self.qparams.scale, self.qparams.zero_point)
        )
        return torch.from_numpy((self.codes.astype(np.float64) - zero_point) * scale)

    def tensor(self) -> Tensor:
        """The IR tensor."""
        return Tensor(self.codes.shape, self.codes.dtype, self.qparams, self.codes if self.constant else None)


def random_codes(random: np.random.Generator, *shape: int) -> Integers:
    """int8 over the whole range."""
    return random.integers(-128, 128, shape).astype(np.int8)


def occurrence(target: str, tensors: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> tuple[Node, Any]:
    """A node of the operator, and its value for real `tensors`."""
    namespace, name, overload = target.split(".")
    operator = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    graph = FxGraph()
    nodes: dict[str, Node] = {}
    for argument, tensor in tensors.items():
        nodes[argument] = graph.placeholder(argument)
        nodes[argument].meta["val"] = tensor
    names = [argument.name for argument in operator._schema.arguments]
    known = {**dict.fromkeys(names), **{a.name: a.default_value for a in operator._schema.arguments}, **options}
    values = [tensors.get(name, known[name]) for name in names]
    node = graph.call_function(operator, tuple(nodes.get(name, known[name]) for name in names))
    node.meta["val"] = operator(*values)
    return node, node.meta["val"]


def deviation(
    target: str, operands: Mapping[str, Quantized], options: Mapping[str, Any], output: QParams | None = None
) -> int:
    """Largest difference in LSBs between LiteRT on the lowered operator and torch on the real values.

    `output` is the output's qparams; None takes those of the inputs, or for an operator with qparams of its own such
    that its values fill the range.
    """
    node, real = occurrence(target, {name: operand.real for name, operand in operands.items()}, options)
    spec = OPERATORS[target]
    site = Site(node, TARGETS["imxrt700"])
    inputs = [operands[name] for name in spec.inputs]
    if output is None and spec.output_rule(node) is OutputRule.SHARED:
        output = inputs[0].qparams
    output = output or QParams.per_tensor(max(0.01, float(real.abs().max())) / 120, 3)
    tensors = {argument: operands[str(argument.target)].tensor() for argument in node.all_input_nodes}
    ops: list[Op] = []
    lowered = spec.lower(Lowering(site, tensors, output, "NONE", ops))
    read = [tensors[argument] for argument in node.all_input_nodes if not operands[str(argument.target)].constant]
    model = write(optimize(Graph(tuple(read), (lowered,), tuple(ops))))
    interpreter = Interpreter(model_content=model, num_threads=1)
    interpreter.allocate_tensors()
    for details, operand in zip(interpreter.get_input_details(), inputs, strict=True):
        interpreter.set_tensor(details["index"], operand.codes)
    interpreter.invoke()
    found = interpreter.get_tensor(interpreter.get_output_details()[0]["index"]).astype(int)
    wanted = torch.clamp(torch.round(real / output.scale[0]) + output.zero_point[0], -128, 127).numpy()
    assert found.shape == wanted.shape
    return int(np.abs(found - wanted).max())

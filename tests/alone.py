"""Tests one operator without export, quantizer or program, so that thousands of geometries are fast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from ai_edge_litert.interpreter import Interpreter
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule

from openneutron.core.fx import iterate_nodes
from openneutron.formats.tflite.write import write
from openneutron.ir.build import optimize
from openneutron.ir.graph import Graph, Op, QParams, Tensor
from openneutron.ops import DECOMPOSITIONS, OPERATORS
from openneutron.ops.lowering import Lowering
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import OutputRule
from openneutron.passes import decompose
from openneutron.targets import TARGETS, Generation

__all__ = ["Integers", "Quantized", "decomposition_error", "deviation", "is_decomposed", "random_codes"]

Integers = npt.NDArray[Any]
TARGET = TARGETS["imxrt700"]
# The scale of an operator with its own output qparams follows from its values, unless all values are zero.
SMALLEST_RANGE = 0.01


@dataclass(frozen=True)
class Quantized:
    """An operand: integers with qparams, computed at run time unless `constant`."""

    codes: Integers
    qparams: QParams
    constant: bool = False

    @property
    def real(self) -> torch.Tensor:
        """The dequantized values in float64."""
        shape = [-1 if dim == self.qparams.axis else 1 for dim in range(self.codes.ndim)]
        scale, zero_point = np.array(self.qparams.scale), np.array(self.qparams.zero_point)
        if self.qparams.axis is not None:
            scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
        return torch.from_numpy((self.codes.astype(np.float64) - zero_point) * scale)

    def tensor(self) -> Tensor:
        """The IR tensor."""
        return Tensor(self.codes.shape, self.codes.dtype, self.qparams, self.codes if self.constant else None)


def random_codes(random: np.random.Generator, *shape: int) -> Integers:
    """Returns int8 values from the whole range."""
    return random.integers(-128, 128, shape).astype(np.int8)


def occurrence(target: str, tensors: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> OpInstance:
    """Returns the operator in a new graph. Its arguments have the names of its schema."""
    namespace, name, overload = target.split(".")
    operator = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    graph = FxGraph()
    nodes = {argument: graph.placeholder(f"{argument}_") for argument in tensors}  # "self" is a name of fx.GraphModule
    for argument, tensor in tensors.items():
        nodes[argument].meta["val"] = tensor
    schema = operator._schema.arguments
    known = {argument.name: options.get(argument.name, argument.default_value) for argument in schema}
    node = graph.call_function(operator, tuple({**known, **nodes}[argument.name] for argument in schema))
    node.meta["val"] = operator(*({**known, **tensors}[argument.name] for argument in schema))
    graph.output(node)
    return OpInstance(node, TARGET)


def deviation(target: str, operands: Mapping[str, Quantized], options: Mapping[str, Any]) -> int:
    """Returns the largest difference in LSBs between LiteRT on the lowered operator and torch on the dequantized
    values.
    """
    instance = occurrence(target, {name: operand.real for name, operand in operands.items()}, options)
    spec, real = OPERATORS[target], instance.node.meta["val"]
    assert not spec.rejections(instance, Generation.MODERN)
    tensors = {node: operands[str(node.target).removesuffix("_")].tensor() for node in instance.node.all_input_nodes}
    first = tensors[next(iterate_nodes(instance.args[spec.inputs[0]]))]
    shares = spec.output_rule(instance.node) is OutputRule.SHARED
    own = QParams.per_tensor(max(SMALLEST_RANGE, float(real.abs().max())) / 120, 3)
    output = first.qparams if shares else own
    ops: list[Op] = []
    lowered = spec.lower(Lowering(instance, tensors, output, "NONE", ops))
    read = [node for node, tensor in tensors.items() if tensor.data is None]
    model = write(optimize(Graph(tuple(tensors[node] for node in read), (lowered,), tuple(ops))))
    interpreter = Interpreter(model_content=model, num_threads=1)
    interpreter.allocate_tensors()
    for details, node in zip(interpreter.get_input_details(), read, strict=True):
        interpreter.set_tensor(details["index"], operands[str(node.target).removesuffix("_")].codes)
    interpreter.invoke()
    found = interpreter.get_tensor(interpreter.get_output_details()[0]["index"]).astype(int)
    wanted = torch.clamp(torch.round(real / output.scale[0]) + output.zero_point[0], -128, 127).numpy()
    assert found.shape == wanted.shape
    return int(np.abs(found - wanted).max())


def is_decomposed(target: str, tensors: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> bool:
    """Whether this call of the operator is decomposed."""
    return target in DECOMPOSITIONS and DECOMPOSITIONS[target].applies(occurrence(target, tensors, options))


def decomposition_error(target: str, tensors: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> float:
    """Returns the largest float difference between the operator and its decomposition, relative to values above 1."""
    node = occurrence(target, tensors, options).node
    wanted = node.meta["val"]
    module = GraphModule(torch.nn.Module(), node.graph)
    assert decompose(module, TARGET)
    found = module(*tensors.values())
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1))

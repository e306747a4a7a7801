"""The form of a declaration for an operator that the NPU lacks: it becomes operators that it has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node, map_arg
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from openneutron.core.constants import insert_constant
from openneutron.core.fx import iterate_nodes, note_replaced, op_name, source_of
from openneutron.errors import ModelError
from openneutron.ops.facts import UNKNOWN, Facts
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import Constraint

__all__ = ["SHARED_QPARAMS", "Decomposition", "Rewriting"]

SHARED_QPARAMS = "openneutron.shared_qparams"
"""Key of a node's metadata: values with the same text there have equal qparams."""

# They find out one size themselves.
_TAKE_A_SHAPE = {torch.ops.aten.reshape.default, torch.ops.aten.view.default}
# What a new node inherits from the one it replaces: where it came from in the user's code.
_PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom")

_WITHOUT_STRIDES = {
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default: torch.ops.aten.reshape.default,
}


@dataclass(frozen=True)
class Rewriting:
    """Writes ATen operators in front of the one they replace."""

    module: GraphModule
    instance: OpInstance
    training: bool = False
    """Whether parameters are still to change, so that none is what it is by its value."""

    @property
    def args(self) -> dict[str, Any]:
        """Arguments by the names of the operator's schema, defaults filled in."""
        return self.instance.args

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the (first) output."""
        return self.instance.shape

    def call(self, target: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Node:
        """A call of `target`: nodes among the arguments stand for their values, and numbers may be operands.

        Raises `ModelError` where the call depends on a size that is not fixed.
        """
        node = self.instance.node
        if target in _TAKE_A_SHAPE and sum(isinstance(size, torch.SymInt) for size in args[1]) == 1:
            args = args[0], [-1 if isinstance(size, torch.SymInt) else size for size in args[1]]
        if any(isinstance(size, torch.SymInt) for size in tree_leaves((args, kwargs))):
            raise self.needs_fixed_sizes()
        with node.graph.inserting_before(node):
            written = node.graph.call_function(target, args, kwargs)
        written.meta = {key: node.meta[key] for key in _PROVENANCE if key in node.meta}
        note_replaced(written, op_name(node))
        written.meta["val"] = target(*map_arg(args, _value), **map_arg(kwargs, _value))
        return written

    def needs_fixed_sizes(self) -> ModelError:
        """That the operator becomes others only where all sizes are fixed."""
        node = self.instance.node
        message = "This operator becomes others for fixed sizes. Export without dynamic_shapes."
        return ModelError(message, node=node.name, op=op_name(node), source=source_of(node))

    def constant(self, value: torch.Tensor) -> Node:
        """A new constant of the graph."""
        return insert_constant(self.module, self.instance.node, value, "constant")

    def share_qparams(self, name: str, values: Iterable[Node]) -> None:
        """Let these values have equal qparams, where none of them is fixed; `name` is unique for this occurrence."""
        for value in values:
            value.meta[SHARED_QPARAMS] = f"{self.instance.node.name} {name}"

    def trace(self) -> Node:
        """The output of the operators that torch itself writes this one with, which has one tensor as output.

        Of those, views become reshapes, as strides are not known beforehand.
        """
        operands = dict.fromkeys(iterate_nodes(list(self.args.values())))

        def compute(*values: torch.Tensor) -> Any:
            known = dict(zip(operands, values, strict=True))
            node = self.instance.node
            return node.target(*map_arg(node.args, known.get), **map_arg(node.kwargs, known.get))  # type: ignore

        traced = make_fx(compute)(*map(_value, operands))
        written: dict[Node, Node] = {}
        placeholders = iter(operands)
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                written[node] = next(placeholders)
            elif node.op == "output":
                return written[node.args[0]]
            else:
                args, kwargs = map_arg((node.args, node.kwargs), written.__getitem__)
                written[node] = self.call(_WITHOUT_STRIDES.get(node.target, node.target), *args, **kwargs)
        raise AssertionError("a graph without an output")

    def value_of(self, argument: str) -> torch.Tensor | None:
        """The tensor of an argument that is a constant of the graph; None for any other."""
        return self.instance.constant(argument)


def _value(node: Node) -> Any:
    return node.meta["val"]


def _always(_: OpInstance) -> bool:
    return True


@dataclass(frozen=True)
class Decomposition:
    """Everything OpenNeutron knows about an operator that it writes with others before anything is annotated.

    It applies to float32 values. What it writes may be decomposed in turn, but must get simpler.
    """

    name: str
    """What users call it; the heading in docs/operators.md."""
    targets: tuple[str, ...]
    """ATen operators ("aten.silu.default"), in-place ones left out: those are gone by then."""
    rewrite: Callable[[Rewriting], Node | Sequence[Node]]
    """Writes the operators that replace it; returns its output, or all its outputs."""
    becomes: str
    """The ATen operators it becomes, for the docs."""
    applies: Callable[[OpInstance], bool] = _always
    """Whether this occurrence needs it, where the operator is declared for the NPU too."""
    constraints: tuple[Constraint, ...] = ()
    """Limits of the decomposition; where one is broken, the operator stays as it is, in float."""
    approximation: float = 1e-5
    """Largest difference in float, relative to the largest value of the output (to 1 where that is smaller)."""
    facts: Facts = field(default=UNKNOWN, compare=False)
    """What passes may know of it, where no `OpSpec` of the operator states it."""
    tolerance: int = 1
    """Largest difference of the `.pte` to the converted module, in LSBs of the output."""
    notes: str = field(default="", compare=False)

    def rejections(self, instance: OpInstance) -> list[str]:
        """The messages of all limits that this occurrence breaks."""
        return [limit.message for limit in self.constraints if not limit.holds(instance)]

"""`Decomposition`: the declaration of an operator that is replaced by simpler operators before annotation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node, map_arg
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from openneutron.core.boundary import error_at
from openneutron.core.constants import insert_constant
from openneutron.core.evaluation import evaluate_call, infer_meta
from openneutron.core.fx import iterate_nodes, note_replaced, op_name, shape_of
from openneutron.errors import ModelError
from openneutron.ops.facts import UNKNOWN, Facts
from openneutron.ops.intervals import Interval, IntervalNote
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import Constraint

__all__ = ["RANGE_LIMIT", "SHARED_QPARAMS", "Decomposition", "Rewriting"]

SHARED_QPARAMS = "openneutron.shared_qparams"
"""Metadata key of a node. Nodes with the same string under this key get equal qparams, except fixed qparams."""

RANGE_LIMIT = IntervalNote("openneutron.range_limit")
"""The interval that contains the int8 range of the node's values. Values beyond it saturate."""

# These operators infer one size that is given as -1.
_TAKE_A_SHAPE = {torch.ops.aten.reshape.default, torch.ops.aten.view.default}
# Metadata that a new node inherits from the node it replaces: the location in the user's code.
_PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom")

_WITHOUT_STRIDES = {
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default: torch.ops.aten.reshape.default,
}


@dataclass(frozen=True)
class Rewriting:
    """Adds ATen operators to a graph, before the operator that they replace."""

    module: GraphModule
    instance: OpInstance
    training: bool = False
    """Whether training may still change parameters. A rewrite must not depend on their values then."""
    is_wide: bool = False
    """Whether the user asked for states that consist of two int8 tensors."""

    @property
    def args(self) -> dict[str, Any]:
        """The arguments by the names of the operator's schema, including defaults."""
        return self.instance.args

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first output."""
        return self.instance.shape

    def call(self, target: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Node:
        """Adds a call of `target` and returns its node. Arguments may be nodes and numbers.

        Raises `ModelError` if the call depends on a dynamic size.
        """
        node = self.instance.node
        if target in _TAKE_A_SHAPE and sum(isinstance(size, torch.SymInt) for size in args[1]) == 1:
            args = args[0], [-1 if isinstance(size, torch.SymInt) else size for size in args[1]]
        if target is torch.ops.aten.expand.default:
            args = args[0], _kept_sizes(args[0], args[1])
        if any(isinstance(size, torch.SymInt) for size in tree_leaves((args, kwargs))):
            raise self.needs_fixed_sizes()
        with node.graph.inserting_before(node):
            written = node.graph.call_function(target, args, kwargs)
        written.meta = {key: node.meta[key] for key in _PROVENANCE if key in node.meta}
        note_replaced(written, op_name(node))
        written.meta["val"] = infer_meta(written)
        return written

    def needs_fixed_sizes(self) -> ModelError:
        """Returns the error for an operator whose decomposition needs fixed sizes."""
        node = self.instance.node
        message = "The decomposition of this operator needs fixed sizes. Export without dynamic_shapes."
        return error_at(node, message)

    def constant(self, value: torch.Tensor) -> Node:
        """Adds a constant to the graph and returns its node."""
        return insert_constant(self.module, self.instance.node, value, "constant")

    def share_qparams(self, name: str, values: Iterable[Node]) -> None:
        """Requests equal qparams for `values`, except those with fixed qparams. `name` is unique in this rewriting."""
        for value in values:
            value.meta[SHARED_QPARAMS] = f"{self.instance.node.name} {name}"

    def limit_range(self, value: Node, limits: Interval) -> None:
        """Requests an int8 range of `value` within `limits`. Values beyond them saturate."""
        RANGE_LIMIT.write(value, limits)

    def trace(self, decompositions: Mapping[Any, Callable[..., Any]] | None = None) -> Node:
        """Adds the operators of torch's own decomposition of this operator, and returns their output.

        `decompositions` maps operators to decompositions that apply in addition to those of composite operators.
        The operator must have one output. Views become reshapes, because strides are unknown at this time.
        """
        operands = dict.fromkeys(iterate_nodes(list(self.args.values())))

        def compute(*values: torch.Tensor) -> Any:
            return evaluate_call(self.instance.node, dict(zip(operands, values, strict=True)).__getitem__)

        traced = make_fx(compute, decomposition_table=decompositions)(*map(_value, operands))
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
        """Returns the tensor of an argument that is a constant of the graph; None for any other argument."""
        return self.instance.constant(argument)


def _kept_sizes(value: Node, sizes: Sequence[Any]) -> list[Any]:
    """Returns the sizes of an expand, with -1 for dynamic sizes that `value` has too."""
    own = (1,) * (len(sizes) - len(shape_of(value))) + shape_of(value)
    return [-1 if isinstance(old, torch.SymInt) else new for old, new in zip(own, sizes, strict=True)]


def _value(node: Node) -> Any:
    return node.meta["val"]


def _always(_: OpInstance) -> bool:
    return True


@dataclass(frozen=True)
class Decomposition:
    """The declaration of an operator that is replaced by other operators before annotation.

    It applies to operators that return float32 values, unless `returns_integers` is True. The new operators may be
    decomposed in turn; each step must be simpler.
    """

    name: str
    """The name for users, which is the heading in docs/operators.md."""
    targets: tuple[str, ...]
    """ATen operators ("aten.silu.default"), without in-place operators, which an earlier pass replaces."""
    rewrite: Callable[[Rewriting], Node | Sequence[Node]]
    """Adds the operators that replace it; returns the new output, or a sequence of all outputs."""
    becomes: str
    """The ATen operators that replace it, for the docs."""
    applies: Callable[[OpInstance], bool] = _always
    """Whether a call is decomposed. For an operator that the NPU also runs, some calls need no decomposition."""
    constraints: tuple[Constraint, ...] = ()
    """Limits of the decomposition. An operator that breaks one is not replaced, and runs in float on the CPU."""
    approximation: float = 1e-5
    """Largest difference between the new operators and the replaced operator, both computed in float.

    It is relative to max(1, largest magnitude of the output).
    """
    facts: Facts = field(default=UNKNOWN, compare=False)
    """Facts for passes, unless an `OpSpec` of the operator states them."""
    tolerance: int = 1
    """Largest difference between the `.pte` and the converted module, in LSBs of the output."""
    returns_integers: bool = False
    """Whether it applies to operators that return integers. The CPU computes them."""
    has_wide_form: bool = False
    """Whether `rewrite` can represent a state by two int8 tensors, and does so if `Rewriting.is_wide`."""
    notes: str = field(default="", compare=False)

    def rejections(self, instance: OpInstance) -> list[str]:
        """Returns the messages of all limits that this call breaks."""
        return [limit.message for limit in self.constraints if not limit.holds(instance)]

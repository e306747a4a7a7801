"""Replaces integers and booleans between float32 values by equivalent float32 or boolean values.

Quantization starts from float32. An integer between a mask and the scores that it hides, or between two conversions,
would keep the neighboring operators on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node, map_arg

from openneutron.core.constants import constant_of, number_of
from openneutron.core.evaluation import evaluate_call
from openneutron.core.fx import arguments, dtype_of, set_argument
from openneutron.ops.comparisons import selects_by_comparison
from openneutron.ops.declared import facts_of, is_op
from openneutron.ops.decomposition import Rewriting
from openneutron.ops.facts import Movement
from openneutron.ops.functions import is_quotient
from openneutron.ops.graph_builder import (
    add,
    convert,
    logical_and,
    logical_not,
    mul,
    replace_with_conversion,
    rsub,
    trunc,
)
from openneutron.ops.masks import HIDDEN_AT_RUN_TIME, only_softmax_reads
from openneutron.ops.op_instance import OpInstance
from openneutron.targets import NeutronTarget

__all__ = ["integers_to_floats"]

_ELEMENTWISE = ("to", "add", "sub", "rsub", "mul", "neg", "abs", "clamp", "comparison", "logic")
# Conversions from float32 to these dtypes round towards zero. Conversions to smaller integers wrap around.
_WIDE = (torch.int16, torch.int32, torch.int64)
_INTEGERS = (*_WIDE, torch.int8, torch.uint8)
_CONCATENATIONS = ("cat", "stack", "hstack, vstack, dstack")


@dataclass(frozen=True)
class _IntegerOfBool:
    """An integer tensor that is `when_false` where the boolean `truth` is false, and `when_true` elsewhere."""

    truth: Node
    when_false: float
    when_true: float

    @property
    def is_cast_of_bool(self) -> bool:
        """Returns whether the integer is 1 where `truth` is true, and 0 elsewhere."""
        return (self.when_false, self.when_true) == (0, 1)


def integers_to_floats(module: GraphModule, target: NeutronTarget) -> bool:
    """Replaces integers. Rules, linear in nodes. `m` is a boolean tensor, `n` a number, `x` a float32 value:

    1. A conversion to the dtype of another tensor (type_as) becomes a conversion that names the dtype.
    2. If an integer is computed from `m` by arithmetic with numbers, and then converted to float32, the arithmetic is
       done in float32: (1 - m.int()).float() becomes 1 - m.float().
    3. A boolean that is computed from such an integer becomes `m` or logical_not(m): m.int() == 0, m.long().bool().
    4. A product of such integers that are 0 or 1 becomes a logical_and.
    5. An integer or boolean operand of a float32 sum, difference, product or quotient is converted to float32 first. A
       boolean factor that comparisons compute is not converted, because such products have a decomposition. The parts
       of a float32 concatenation are converted too.
    6. A conversion of `x` to int16, int32 or int64 and back becomes trunc(x).
    7. Before a softmax, scores - n * mask becomes scores + (-n) * mask if n hides scores.
    """
    rewriter = _IntegerRewriter(module, target)
    for node in list(module.graph.nodes):
        rewriter.visit(node)
    if rewriter.changed or rewriter.choices:  # new moves of booleans may have no reader
        module.graph.eliminate_dead_code()
        module.recompile()
    return rewriter.changed


@dataclass
class _IntegerRewriter:
    module: GraphModule
    target: NeutronTarget
    choices: dict[Node, _IntegerOfBool] = field(default_factory=dict)
    changed: bool = False

    def visit(self, node: Node) -> None:
        """Applies the rules to `node`, whose operands were visited before."""
        dtype = dtype_of(node)
        if node.op != "call_function" or dtype is None:
            return
        if is_op(node, "to"):
            self._convert_to_a_dtype(node)
        if dtype in (*_INTEGERS, torch.bool):
            self._record_integer_of_bool(node)
        elif dtype == torch.float32 and is_op(node, "to"):
            self._rewrite_conversion(node)
        elif dtype == torch.float32 and (is_op(node, "add", "sub", "mul") or is_quotient(node)):
            self._convert_operands(node)
            self._rewrite_mask_subtraction(node)
        elif dtype == torch.float32 and is_op(node, *_CONCATENATIONS):
            self._convert_parts(node)

    def _convert_to_a_dtype(self, node: Node) -> None:
        """Rule 1."""
        if len(node.all_input_nodes) > 1:
            replace_with_conversion(node, node.args[0], dtype_of(node))
            self.changed = True

    def _record_integer_of_bool(self, node: Node) -> None:
        """Applies rules 3 and 4, and records the boolean from which `node` is computed."""
        choice = self._integer_of_bool(node)
        if choice is None:
            return
        self.choices[node] = choice
        if dtype_of(node) != torch.bool or all(dtype_of(source) == torch.bool for source in node.all_input_nodes):
            return
        if choice.is_cast_of_bool:
            self._replace_node(node, choice.truth)
        elif (choice.when_false, choice.when_true) == (1, 0):
            self._replace_node(node, logical_not(self._rewriting_before(node), choice.truth))

    def _integer_of_bool(self, node: Node) -> _IntegerOfBool | None:
        sources = node.all_input_nodes
        known = [self._integer_of_bool_for(source) for source in sources]
        if not known or not isinstance(node.target, torch._ops.OpOverload):
            return None
        first = known[0]
        if len(known) == 2 and is_op(node, "mul") and all(choice and choice.is_cast_of_bool for choice in known):
            truths = [choice.truth for choice in known if choice is not None]
            return _IntegerOfBool(logical_and(self._rewriting_before(node), *truths), 0, 1)
        if first is None or len(known) > 1:
            return None
        if facts_of(node).movement not in (None, Movement.JOIN):
            args = map_arg(node.args, lambda _: first.truth)
            moved = self._rewriting_before(node).call(node.target, *args, **node.kwargs)
            return _IntegerOfBool(moved, first.when_false, first.when_true)
        if not is_op(node, *_ELEMENTWISE):
            return None
        false, true = (_evaluate_at(node, sources[0], end) for end in (first.when_false, first.when_true))
        return _IntegerOfBool(first.truth, false, true)

    def _integer_of_bool_for(self, source: Node) -> _IntegerOfBool | None:
        if source in self.choices:
            return self.choices[source]
        is_truth = dtype_of(source) == torch.bool and constant_of(self.module, source) is None
        return _IntegerOfBool(source, 0, 1) if is_truth else None

    def _rewrite_conversion(self, node: Node) -> None:
        """Applies rules 2 and 6."""
        source = node.args[0]
        if not isinstance(source, Node) or dtype_of(source) not in _INTEGERS:
            return
        written = self._compute_in_float(node, source)
        if written is not None:
            self._replace_node(node, written)

    def _compute_in_float(self, node: Node, integer: Node) -> Node | None:
        """Returns `integer` computed in float32 before `node`, or None if no rule avoids its conversion."""
        writing = self._rewriting_before(node)
        choice = self.choices.get(integer)
        if choice is not None:
            truths = convert(writing, choice.truth, torch.float32)
            if choice.is_cast_of_bool:
                return truths
            if choice.when_true == choice.when_false - 1:
                return rsub(writing, truths, choice.when_false)
            scaled = truths
            if (factor := choice.when_true - choice.when_false) != 1:
                scaled = mul(writing, truths, factor)
            return add(writing, scaled, choice.when_false) if choice.when_false else scaled
        value = _match_truncation(integer)
        return None if value is None else trunc(writing, value)

    def _convert_operands(self, node: Node) -> None:
        """Rule 5."""
        for name, operand in arguments(node).items():
            if name not in ("self", "other") or not isinstance(operand, Node):
                continue
            is_integer = dtype_of(operand) in (*_INTEGERS, torch.bool)
            if not is_integer or constant_of(self.module, operand) is not None:
                continue
            choice = self.choices.get(operand)
            if choice is not None and choice.is_cast_of_bool and choice.truth is not operand:
                set_argument(node, name, operand := choice.truth)
                self.changed = True
            if is_op(node, "mul") and selects_by_comparison(OpInstance(node, self.target), name):
                continue
            written = None if dtype_of(operand) == torch.bool else self._compute_in_float(node, operand)
            if written is None:
                written = convert(self._rewriting_before(node), operand, torch.float32)
            set_argument(node, name, written)
            self.changed = True

    def _convert_parts(self, node: Node) -> None:
        """Rule 5 for concatenations."""
        for part in dict.fromkeys(node.all_input_nodes):
            if dtype_of(part) in (*_INTEGERS, torch.bool):
                node.replace_input_with(part, convert(self._rewriting_before(node), part, torch.float32))
                self.changed = True

    def _rewrite_mask_subtraction(self, node: Node) -> None:
        """Rule 7."""
        args = arguments(node)
        if not is_op(node, "sub") or args["alpha"] != 1 or not only_softmax_reads(node):
            return
        product = args["other"]
        if not isinstance(product, Node) or not is_op(product, "mul"):
            return
        for mask, number in (product.args, product.args[::-1]):
            factor = number_of(number)
            if isinstance(mask, Node) and factor is not None and abs(factor) >= -HIDDEN_AT_RUN_TIME:
                writing = self._rewriting_before(node)
                self._replace_node(node, add(writing, args["self"], mul(writing, mask, -factor)))
                return

    def _rewriting_before(self, node: Node) -> Rewriting:
        return Rewriting(self.module, OpInstance(node, self.target))

    def _replace_node(self, node: Node, written: Node) -> None:
        node.replace_all_uses_with(written)
        self.changed = True


def _evaluate_at(node: Node, source: Node, value: float) -> float:
    """Returns the value of `node` if `source`, its only operand, has `value`. Computed in the node's dtype, which may
    wrap.
    """
    given = torch.tensor(value, dtype=dtype_of(source))
    return int(evaluate_call(node, lambda _: given))


def _match_truncation(integer: Node) -> Node | None:
    """Returns the float32 value from which conversions alone compute `integer`, or None."""
    node: object = integer
    while isinstance(node, Node) and dtype_of(node) in _WIDE and is_op(node, "to"):
        node = node.args[0]
    return node if isinstance(node, Node) and node is not integer and dtype_of(node) == torch.float32 else None

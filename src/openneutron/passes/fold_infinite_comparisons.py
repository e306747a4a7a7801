"""Folds comparisons of finite values with infinity, and of values with themselves.

torch's decompositions of `logsumexp`, `logaddexp` and `scaled_dot_product_attention` contain such comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from openneutron.core.constants import constant_of, insert_constant, number_of
from openneutron.core.fx import arguments, dtype_of, finish_rewrite, first_operand, iterate_nodes, op_name, shape_of
from openneutron.ops.declared import facts_of, is_op
from openneutron.ops.graph_builder import NodeBuilder, expand
from openneutron.ops.masks import HIDDEN

__all__ = ["fold_infinite_comparisons"]

_ORDERS: Mapping[str, Callable[[float, float], bool]] = {
    "eq": lambda value, number: value == number,
    "ne": lambda value, number: value != number,
    "lt": lambda value, number: value < number,
    "le": lambda value, number: value <= number,
    "gt": lambda value, number: value > number,
    "ge": lambda value, number: value >= number,
}
_TESTS = {"isnan": False, "isinf": False, "isposinf": False, "isneginf": False, "isfinite": True}
_CONJUNCTIONS = {"logical_and", "bitwise_and", "__and__", "mul"}
_DISJUNCTIONS = {"logical_or", "bitwise_or", "__or__"}
_NEGATIONS = {"logical_not", "bitwise_not"}
_KEEPS_TRUTH = {"any", "all", "clone", "alias"}


def fold_infinite_comparisons(module: GraphModule) -> bool:
    """Folds the comparisons. Rules, linear in nodes and uses:

    1. A comparison of a finite value with an infinite number, an equality of a value with itself, and a test of a
       finite value for infinity or NaN have one known result, and so have logical operators and moves of such results.
    2. A `where` or `masked_fill` by such a result becomes the value that it selects.
    3. Any other operator that reads such a result reads a constant.
    4. A softmax that is 0 for rows of -inf, `where(~any(x != -inf), 0, softmax(x))` or `where(isnan(p), 0, p)`, becomes
       the softmax of clamp(x, `HIDDEN`), which `scaled_dot_product_attention` becomes as well. Its values in these rows
       are equal, and not NaN.

    A value is finite if a layer or a matrix product computes it, or if it is computed from finite values. Inputs of the
    model may be masks with -inf, so they count as finite for comparisons with +inf only.
    """
    known: dict[Node, bool] = {}
    finite: set[Node] = set()
    changed = False
    for node in list(module.graph.nodes):
        if is_op(node, "softmax") and any(_name(user) == "isnan" for user in node.users):
            if first_operand(node) not in finite:
                _limit_scores(node)
            finite.add(node)
        elif _is_finite(module, node, finite):
            finite.add(node)
        if node.op != "call_function":
            continue
        truth = _truth(node, known, finite)
        if truth is not None:
            known[node] = truth
        elif any(read in known for read in node.all_input_nodes):
            _use_known(module, node, known)
            changed = True
        elif (softmax := _softmax_of_visible_rows(node)) is not None:
            _limit_scores(softmax)
            node.replace_all_uses_with(softmax)
            changed = True
    return finish_rewrite(module, changed=changed)


def _is_finite(module: GraphModule, node: Node, finite: set[Node]) -> bool:
    constant = constant_of(module, node)
    if constant is not None:
        return bool(constant.isfinite().all())
    if node.op != "call_function":
        return False
    if any(isinstance(item, float) and not math.isfinite(item) for item in (*node.args, *node.kwargs.values())):
        return False
    is_product = facts_of(node).layer is not None or is_op(node, "mm", "addmm", "bmm", "matmul")
    return is_product or (bool(node.all_input_nodes) and finite.issuperset(node.all_input_nodes))


def _truth(node: Node, known: Mapping[Node, bool], finite: set[Node]) -> bool | None:
    """Returns the value of all elements of a bool tensor if it is known, else None."""
    if dtype_of(node) != torch.bool:
        return None
    name, args = _name(node), arguments(node)
    value, other = args.get("self"), args.get("other")
    if name in _TESTS:
        return _TESTS[name] if value in finite else None
    if name in _ORDERS:
        return _comparison(_ORDERS[name], value, other, finite)
    truths = [known.get(read) for read in iterate_nodes([value, other])]
    if name in _CONJUNCTIONS:
        return False if False in truths else True if None not in truths and truths else None
    if name in _DISJUNCTIONS:
        return True if True in truths else False if None not in truths and truths else None
    if not truths or truths[0] is None:
        return None
    if name in _NEGATIONS:
        return not truths[0]
    return truths[0] if name in _KEEPS_TRUTH or facts_of(node).movement is not None else None


def _comparison(holds: Callable[[float, float], bool], value: Any, other: Any, finite: set[Node]) -> bool | None:
    if value is other:
        return holds(0.0, 0.0)
    number = number_of(other)
    if number is None or not math.isinf(number) or not isinstance(value, Node) or dtype_of(value) != torch.float32:
        return None
    return holds(0.0, number) if number > 0 or value in finite else None


def _limit_scores(softmax: Node) -> None:
    scores = first_operand(softmax)
    softmax.replace_input_with(scores, NodeBuilder(softmax, softmax).call(torch.ops.aten.clamp.default, scores, HIDDEN))


def _softmax_of_visible_rows(node: Node) -> Node | None:
    """Returns the softmax in the first pattern of rule 4, if `node` is its `where`."""
    if _name(node) != "where":
        return None
    args = arguments(node)
    rows, softmax = args["condition"], args["other"]
    if number_of(args["self"]) != 0 or _name(rows) not in _NEGATIONS or not is_op(softmax, "softmax"):
        return None
    visible, dim = first_operand(rows), arguments(softmax)["dim"]
    if _name(visible) != "any" or arguments(visible).get("dim") not in (dim, [dim]):
        return None
    is_negated = _name(first_operand(visible)) in _NEGATIONS
    comparison = first_operand(first_operand(visible)) if is_negated else first_operand(visible)
    if _name(comparison) != ("eq" if is_negated else "ne") or first_operand(comparison) is not first_operand(softmax):
        return None
    return softmax if number_of(arguments(comparison)["other"]) == -math.inf else None


def _name(node: object) -> str:
    """Returns the name of an ATen operator without namespace and overload; an empty text for another node."""
    if not isinstance(node, Node) or node.op != "call_function":
        return ""
    return op_name(node).removeprefix("aten.").partition(".")[0]


def _use_known(module: GraphModule, node: Node, known: Mapping[Node, bool]) -> None:
    """Applies rule 2 or 3 to `node`, which reads values with a known result."""
    args = arguments(node)
    name = _name(node)
    condition = args.get("condition", args.get("mask"))
    if name in ("where", "masked_fill") and isinstance(condition, Node) and condition in known:
        chosen = _selected(args, known[condition])
        if isinstance(chosen, Node) and dtype_of(chosen) == dtype_of(node):
            if shape_of(chosen) != shape_of(node):
                chosen = expand(NodeBuilder(node, node), chosen, list(shape_of(node)))
            node.replace_all_uses_with(chosen)
            return
    for read in node.all_input_nodes:
        if read in known:
            value = torch.full(shape_of(read), known[read], dtype=torch.bool)
            node.replace_input_with(read, insert_constant(module, node, value, "known"))


def _selected(args: Mapping[str, Any], truth: bool) -> Any:
    """Returns the value that `where(condition, self, other)` or `masked_fill(self, mask, value)` selects."""
    if "condition" in args:
        return args["self"] if truth else args["other"]
    return args["value"] if truth else args["self"]

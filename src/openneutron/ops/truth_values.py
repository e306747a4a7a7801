"""Bool tensors whose elements all have one known value: comparisons of finite values with infinity."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Set
from typing import Any

import torch
from torch.fx import GraphModule, Node

from openneutron.core.constants import constant_of, number_of
from openneutron.core.fx import arguments, dtype_of, first_operand, iterate_nodes
from openneutron.ops.comparisons import COMPARISONS, CONJUNCTIONS, DISJUNCTIONS, NEGATIONS, base_name
from openneutron.ops.declared import facts_of, is_op

__all__ = [
    "is_finite", "is_tested_for_nan", "selected_value", "softmax_of_visible_rows", "tests_values", "truth_of",
    "value_without_nan",
]  # fmt: skip

_TESTS = {"isnan": False, "isinf": False, "isposinf": False, "isneginf": False, "isfinite": True}
_KEEPS_TRUTH = {"any", "all", "clone", "alias"}
_PRODUCTS = ("mm", "addmm", "bmm", "matmul")
# Divisions, logarithms, roots and powers are not among them: they may compute infinity or NaN from finite values.
_KEEPS_FINITE = (
    "abs", "add", "amax", "amin", "clamp", "maximum", "mean", "minimum", "mul", "neg", "relu", "sigmoid", "softmax",
    "split", "sub", "sum", "tanh",
)  # fmt: skip


def is_finite(module: GraphModule, node: Node, finite: Set[Node]) -> bool:
    """Whether all values of `node` are finite. `finite` has the earlier nodes with finite values."""
    constant = constant_of(module, node)
    if constant is not None:
        return bool(constant.isfinite().all())
    if node.op != "call_function":
        return False
    if any(isinstance(item, float) and not math.isfinite(item) for item in (*node.args, *node.kwargs.values())):
        return False
    if facts_of(node).layer is not None or is_op(node, *_PRODUCTS):
        return True
    is_kept = facts_of(node).movement is not None or is_op(node, *_KEEPS_FINITE) or node.target is operator.getitem
    return is_kept and bool(node.all_input_nodes) and finite >= set(node.all_input_nodes)


def tests_values(node: Node) -> bool:
    """Whether `node` compares values, tests them for infinity or NaN, or replaces NaN."""
    name = _name(node)
    return name in COMPARISONS or name in _TESTS or name == "nan_to_num"


def is_tested_for_nan(node: Node) -> bool:
    """Whether an operator that reads `node` tests it for NaN, or replaces NaN."""
    return any(_name(user) in ("isnan", "nan_to_num") for user in node.users)


def truth_of(node: Node, known: Mapping[Node, bool], finite: Set[Node]) -> bool | None:
    """Returns the value of all elements of a bool tensor if it is known, else None.

    `known` has the known values of earlier nodes, `finite` the earlier nodes with finite values.
    """
    if dtype_of(node) != torch.bool:
        return None
    name, args = _name(node), arguments(node)
    value, other = args.get("self"), args.get("other")
    if name in _TESTS:
        return _TESTS[name] if value in finite else None
    if name in COMPARISONS:
        return _comparison(COMPARISONS[name], value, other, finite)
    truths = [known.get(read) for read in iterate_nodes([value, other])]
    if name in CONJUNCTIONS:
        return False if False in truths else True if None not in truths and truths else None
    if name in DISJUNCTIONS:
        return True if True in truths else False if None not in truths and truths else None
    if not truths or truths[0] is None:
        return None
    if name in NEGATIONS:
        return not truths[0]
    return truths[0] if name in _KEEPS_TRUTH or facts_of(node).movement is not None else None


def _comparison(holds: Callable[[float, float], bool], value: Any, other: Any, finite: Set[Node]) -> bool | None:
    if value is other:
        return holds(0.0, 0.0)
    number = number_of(other)
    if number is None or not math.isinf(number) or not isinstance(value, Node) or dtype_of(value) != torch.float32:
        return None
    return holds(0.0, number) if number > 0 or value in finite else None


def softmax_of_visible_rows(node: Node) -> Node | None:
    """Returns softmax(x) if `node` is where(~any(x != -inf), 0, softmax(x)), else None."""
    if _name(node) != "where":
        return None
    args = arguments(node)
    rows, softmax = args["condition"], args["other"]
    if number_of(args["self"]) != 0 or _name(rows) not in NEGATIONS or not is_op(softmax, "softmax"):
        return None
    visible, dim = first_operand(rows), arguments(softmax)["dim"]
    if _name(visible) != "any" or arguments(visible).get("dim") not in (dim, [dim]):
        return None
    is_negated = _name(first_operand(visible)) in NEGATIONS
    comparison = first_operand(first_operand(visible)) if is_negated else first_operand(visible)
    if _name(comparison) != ("eq" if is_negated else "ne") or first_operand(comparison) is not first_operand(softmax):
        return None
    return softmax if number_of(arguments(comparison)["other"]) == -math.inf else None


def value_without_nan(node: Node, finite: Set[Node]) -> Node | None:
    """Returns the operand of a `nan_to_num` whose operand is finite; None for any other node."""
    is_identity = _name(node) == "nan_to_num" and first_operand(node) in finite
    return first_operand(node) if is_identity else None


def selected_value(node: Node, known: Mapping[Node, bool]) -> Node | None:
    """Returns the operand that a `where` or `masked_fill` selects by a known condition; None if it is not a node."""
    if _name(node) not in ("where", "masked_fill"):
        return None
    args = arguments(node)
    condition = args.get("condition", args.get("mask"))
    if not isinstance(condition, Node) or condition not in known:
        return None
    if "condition" in args:
        chosen = args["self"] if known[condition] else args["other"]
    else:
        chosen = args["value"] if known[condition] else args["self"]
    return chosen if isinstance(chosen, Node) else None


def _name(node: object) -> str:
    """Returns the name of an ATen operator without namespace and overload; an empty text for another node."""
    return base_name(node) if isinstance(node, Node) and node.op == "call_function" else ""

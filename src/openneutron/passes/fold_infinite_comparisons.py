"""Folds comparisons of finite values with infinity, and of values with themselves.

torch's decompositions of `logsumexp`, `logaddexp` and `scaled_dot_product_attention` contain such comparisons.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import GraphModule, Node

from openneutron.core.constants import insert_constant
from openneutron.core.fx import dtype_of, finish_rewrite, first_operand, shape_of
from openneutron.ops.declared import is_op
from openneutron.ops.graph_builder import NodeBuilder, expand
from openneutron.ops.masks import limit_scores
from openneutron.ops.truth_values import (
    is_finite,
    is_tested_for_nan,
    selected_value,
    softmax_of_visible_rows,
    tests_values,
    truth_of,
    value_without_nan,
)

__all__ = ["fold_infinite_comparisons"]


def fold_infinite_comparisons(module: GraphModule) -> bool:
    """Folds the comparisons. Rules, linear in nodes, uses and the values of constants:

    1. A comparison of a finite value with an infinite number, an equality of a value with itself, and a test of a
       finite value for infinity or NaN have one known result, and so have logical operators and moves of such results.
    2. A `where` or `masked_fill` by such a result becomes the value that it selects.
    3. Any other operator that reads such a result reads a constant.
    4. A `nan_to_num` of a finite value is removed.
    5. A softmax that is 0 for rows of -inf, `where(~any(x != -inf), 0, softmax(x))`, `where(isnan(p), 0, p)` or
       `nan_to_num(p)`, becomes the softmax of clamp(x, `HIDDEN`), which `scaled_dot_product_attention` becomes as well.
       Its values in these rows are equal, and not NaN.

    A value is finite if a layer or a matrix product computes it, or if sums, products, moves and the like compute it
    from finite values. Inputs of the model may be masks with -inf, so they count as finite for comparisons with +inf
    only. The pass does not change a graph without comparisons, and does not search its constants for infinity.
    """
    if not any(map(tests_values, module.graph.nodes)):
        return False
    known: dict[Node, bool] = {}
    finite: set[Node] = set()
    changed = False
    for node in list(module.graph.nodes):
        if is_op(node, "softmax") and is_tested_for_nan(node):
            if first_operand(node) not in finite:
                _limit_scores(node)
            finite.add(node)
        elif is_finite(module, node, finite):
            finite.add(node)
        if node.op != "call_function":
            continue
        truth = truth_of(node, known, finite)
        if truth is not None:
            known[node] = truth
        elif any(read in known for read in node.all_input_nodes):
            _use_known(module, node, known)
            changed = True
        elif (value := value_without_nan(node, finite)) is not None:
            node.replace_all_uses_with(value)
            changed = True
        elif (softmax := softmax_of_visible_rows(node)) is not None:
            _limit_scores(softmax)
            node.replace_all_uses_with(softmax)
            changed = True
    return finish_rewrite(module, changed=changed)


def _limit_scores(softmax: Node) -> None:
    scores = first_operand(softmax)
    softmax.replace_input_with(scores, limit_scores(NodeBuilder(softmax, softmax), scores))


def _use_known(module: GraphModule, node: Node, known: Mapping[Node, bool]) -> None:
    """Applies rule 2 or 3 to `node`, which reads values with a known result."""
    chosen = selected_value(node, known)
    if chosen is not None and dtype_of(chosen) == dtype_of(node):
        if shape_of(chosen) != shape_of(node):
            chosen = expand(NodeBuilder(node, node), chosen, list(shape_of(node)))
        node.replace_all_uses_with(chosen)
        return
    for read in node.all_input_nodes:
        if read in known:
            value = torch.full(shape_of(read), known[read], dtype=torch.bool)
            node.replace_input_with(read, insert_constant(module, node, value, "known"))

"""Protects models from torchao's batch norm folding, which runs before any quantizer and makes some models wrong.

torchao 0.18 computes another function, without an error, for:

- a convolution or linear whose output has readers other than the batch norm
- a weight or bias that another operator reads too
- a batch norm that follows a folded batch norm: torchao drops the second one
- a transposed convolution in groups
- a batch norm that uses the statistics of its batch

It raises an untyped error for:

- a linear without a bias, because its new bias has no metadata
- a linear before a batch norm without weight and bias
- a weight or bias that is computed or is a buffer
- a convolution without a batch dimension
- a batch norm without running statistics, or with computed parameters

`passes.fold_batch_norm` folds such models first. The quantizer folds or refuses batch norms that remain.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from openneutron.core.constants import attribute
from openneutron.core.fx import arguments, cleaned_once, shape_of
from openneutron.ops.declared import is_op, layer_kind
from openneutron.ops.facts import LayerKind
from openneutron.passes import densify_constants, fold_batch_norm, fold_constants
from openneutron.passes.checks import check_batch_norm

__all__ = ["is_folded_wrongly", "protect_from_wrong_folding"]

_FOLDS = ("_fuse_conv_bn_", "_fuse_linear_bn_")


def protect_from_wrong_folding() -> None:
    """Makes `prepare_pt2e` fold batch norms correctly where torchao does not. A second call does nothing.

    This function replaces two functions of torchao's module `quantize_pt2e` for the rest of the process, because
    torchao 0.18 has no narrower hook: `prepare_pt2e` calls these two functions first, with the model alone, and uses
    the quantizer only afterwards. By then the folded batch norms are removed and the weights are overwritten, so
    `transform_for_annotation` cannot undo the folding. Users import `prepare_pt2e` before they construct a quantizer,
    so `prepare_pt2e` cannot be wrapped either. The constructor of the quantizer is the last call of OpenNeutron before
    `prepare_pt2e`.

    The replacement affects every quantizer in the process. It does not change the result for a model that torchao folds
    correctly. For a batch norm without running statistics, `prepare_pt2e` then raises `ModelError`. `quantize` does not
    need the replacement, because it folds all batch norms before it calls `prepare_pt2e`.
    """
    from torchao.quantization.pt2e import quantize_pt2e

    for name in _FOLDS:
        fold: Any = getattr(quantize_pt2e, name, None)
        if fold is not None and not hasattr(fold, "folds_right"):
            setattr(quantize_pt2e, name, _with_correct_folding(fold))


def _with_correct_folding(fold: Callable[[GraphModule], None]) -> Callable[[GraphModule], None]:
    @functools.wraps(fold)
    def folded_right(module: GraphModule) -> None:
        for node in module.graph.nodes:
            check_batch_norm(node)
        densify_constants(module)  # refuses operators such as _nnz, which folding removes as dead
        if is_folded_wrongly(module):
            fold_constants(module)
            fold_batch_norm(module)
        if not is_folded_wrongly(module):
            with cleaned_once(module):  # torchao removes dead operators after each batch norm, in quadratic time
                fold(module)

    folded_right.folds_right = True  # type: ignore[attr-defined]
    return folded_right


def is_folded_wrongly(module: GraphModule) -> bool:
    """Returns whether torchao would fold a batch norm of this exported model incorrectly. Linear in nodes."""
    read = Counter(str(node.target) for node in module.graph.nodes if node.op == "get_attr" for _ in node.users)
    return any(
        is_op(node, "batch_norm") and _fold_target(node) is not None and not _is_folded_correctly(module, node, read)
        for node in module.graph.nodes
    )


def _fold_target(batch_norm: Node) -> Node | None:
    """Returns the convolution or linear into which torchao folds `batch_norm`, or None."""
    producer = batch_norm.args[0]
    while isinstance(producer, Node) and is_op(producer, "batch_norm"):
        producer = producer.args[0]
    if not isinstance(producer, Node):
        return None
    kind = layer_kind(producer)
    is_folded = kind is not None and (kind.is_convolution or len(shape_of(producer)) == 2)
    return producer if is_folded else None


def _is_folded_correctly(module: GraphModule, batch_norm: Node, read: Counter[str]) -> bool:
    producer = batch_norm.args[0]
    if not isinstance(producer, Node) or is_op(producer, "batch_norm") or len(producer.users) > 1:
        return False
    norm, args = arguments(batch_norm), arguments(producer)
    weight, bias = args["weight"], args["bias"]
    is_linear = layer_kind(producer) is LayerKind.LINEAR
    parameters = [norm[name] for name in ("weight", "bias", "running_mean", "running_var")]
    if is_linear and None in (bias, *parameters):
        return False
    return (
        not norm["training"]
        and all(node is None or node.op == "get_attr" for node in parameters)
        and _is_own_parameter(module, weight, read)
        and (bias is None or _is_own_parameter(module, bias, read))
        and (is_linear or len(shape_of(producer)) == len(shape_of(weight)))
        and not (layer_kind(producer) is LayerKind.TRANSPOSED and args["groups"] > 1)
    )


def _is_own_parameter(module: GraphModule, node: Node, read: Counter[str]) -> bool:
    """Returns whether `node` reads a parameter that no other node reads."""
    if node.op != "get_attr" or read[str(node.target)] > 1:
        return False
    return isinstance(attribute(module, str(node.target)), torch.nn.Parameter)

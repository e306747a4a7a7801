"""torchao folds batch norms before it asks a quantizer for anything, and some of them into a wrong model.

Seen in torchao 0.18, without an error:

- a convolution or linear whose output the batch norm does not read alone
- a weight or bias that another operator reads too
- a batch norm behind one that was folded, which is dropped
- a transposed convolution in groups
- a batch norm that uses the statistics of its batch

With an untyped error:

- a linear without a bias, as its new bias has no metadata, or in front of a batch norm without weight and bias
- a weight or bias that is computed, or a buffer
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
from openneutron.core.fx import arguments, shape_of
from openneutron.ops.declared import is_op, layer_kind
from openneutron.ops.facts import LayerKind
from openneutron.passes import fold_batch_norm, fold_constants
from openneutron.passes.checks import check_batch_norm

__all__ = ["is_folded_wrongly", "protect_from_wrong_folding"]

_FOLDS = ("_fuse_conv_bn_", "_fuse_linear_bn_")


def protect_from_wrong_folding() -> None:
    """Let `prepare_pt2e` fold models that torchao folds wrongly as they should be; a second call does nothing.

    The change is to torchao's module and lasts as long as the process, because no narrower place exists (torchao 0.18):
    `prepare_pt2e` calls these two functions first, with the model alone, and touches the quantizer only afterwards. By
    then the folded batch norms are gone and the weights are overwritten, so `transform_for_annotation` cannot undo it.
    Users import `prepare_pt2e` before they construct a quantizer, so it cannot be wrapped either. The constructor of
    the quantizer is the last call of OpenNeutron before `prepare_pt2e`.

    The change holds for every quantizer in the process, and changes nothing for models that torchao folds right. For a
    batch norm without running statistics `prepare_pt2e` then raises `ModelError`. `quantize` does not depend on it: it
    folds all batch norms before it calls `prepare_pt2e`.
    """
    from torchao.quantization.pt2e import quantize_pt2e

    for name in _FOLDS:
        fold: Any = getattr(quantize_pt2e, name, None)
        if fold is not None and not hasattr(fold, "folds_right"):
            setattr(quantize_pt2e, name, _folding_right(fold))


def _folding_right(fold: Callable[[GraphModule], None]) -> Callable[[GraphModule], None]:
    @functools.wraps(fold)
    def folded_right(module: GraphModule) -> None:
        for node in module.graph.nodes:
            check_batch_norm(node)
        if is_folded_wrongly(module):
            fold_constants(module)
            fold_batch_norm(module)
        if not is_folded_wrongly(module):
            fold(module)

    folded_right.folds_right = True  # type: ignore[attr-defined]
    return folded_right


def is_folded_wrongly(module: GraphModule) -> bool:
    """Whether torchao would fold a batch norm of this exported model into something else. Linear in nodes."""
    read = Counter(str(node.target) for node in module.graph.nodes if node.op == "get_attr" for _ in node.users)
    return any(
        is_op(node, "batch_norm") and _folds_into(node) is not None and not _folds_right(module, node, read)
        for node in module.graph.nodes
    )


def _folds_into(batch_norm: Node) -> Node | None:
    """The convolution or linear that torchao folds `batch_norm` into, if any."""
    producer = batch_norm.args[0]
    while isinstance(producer, Node) and is_op(producer, "batch_norm"):
        producer = producer.args[0]
    if not isinstance(producer, Node):
        return None
    kind = layer_kind(producer)
    is_folded = kind is not None and (kind.is_convolution or len(shape_of(producer)) == 2)
    return producer if is_folded else None


def _folds_right(module: GraphModule, batch_norm: Node, read: Counter[str]) -> bool:
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
    """Whether `node` reads a parameter that nothing else reads."""
    if node.op != "get_attr" or read[str(node.target)] > 1:
        return False
    return isinstance(attribute(module, str(node.target)), torch.nn.Parameter)

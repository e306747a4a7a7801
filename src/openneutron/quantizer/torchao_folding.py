"""torchao folds batch norms before it asks a quantizer for anything, and some of them into a wrong model.

Seen in torchao 0.18: a convolution whose output the batch norm does not read alone; one weight that several
convolutions read, each with a batch norm of its own, or some with none, or without a bias; a transposed convolution in
groups; a batch norm without running statistics (a TypeError). Such models are folded by `passes.fold_batch_norm` first,
or refused.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

from torch.fx import GraphModule, Node

from openneutron.fx import arguments, op_name
from openneutron.passes import fold_batch_norm
from openneutron.passes.checks import check_batch_norm

__all__ = ["is_folded_wrongly", "protect_from_wrong_folding"]

_BATCH_NORM = "aten.batch_norm.default"


def protect_from_wrong_folding() -> None:
    """Let `prepare_pt2e` fold models that torchao folds wrongly as they should be; a second call does nothing.

    A quantizer has no say before torchao folds, hence the change to torchao itself. It holds for every quantizer in the
    process, and changes nothing for models that torchao folds right. For a batch norm without running statistics
    `prepare_pt2e` then raises `ModelError`.
    """
    from torchao.quantization.pt2e import quantize_pt2e

    fold: Any = getattr(quantize_pt2e, "_fuse_conv_bn_", None)
    if fold is None or hasattr(fold, "folds_right"):
        return

    @functools.wraps(fold)
    def folded_right(module: GraphModule) -> None:
        for node in module.graph.nodes:
            check_batch_norm(node)
        if is_folded_wrongly(module):
            fold_batch_norm(module)
        fold(module)

    folded_right.folds_right = True  # type: ignore[attr-defined]
    quantize_pt2e._fuse_conv_bn_ = folded_right


def is_folded_wrongly(module: GraphModule) -> bool:
    """Whether torchao would fold a batch norm of this exported model into something else. Linear in nodes."""
    read = [node.args[0] for node in module.graph.nodes if op_name(node) == _BATCH_NORM]
    folded = [producer for producer in read if isinstance(producer, Node) and _weight(producer)]
    readers = Counter(_weight(node) for node in module.graph.nodes)
    return any(
        len(producer.users) > 1 or readers[_weight(producer)] > 1 or _is_transposed_in_groups(producer)
        for producer in folded
    )


def _is_transposed_in_groups(node: Node) -> bool:
    return op_name(node).startswith("aten.conv_transpose") and arguments(node)["groups"] > 1


def _weight(node: Node) -> str | None:
    """Name of the weight of a convolution or linear, the operators that torchao folds into; None for any other node."""
    if not op_name(node).startswith(("aten.conv", "aten.linear.")) or len(node.args) < 2:
        return None
    weight = node.args[1]
    return str(weight.target) if isinstance(weight, Node) and weight.op == "get_attr" else None

"""Rewrites of the exported ATen graph that make it quantizable, a file per pass.

A pass takes a GraphModule, changes it in place and says whether it changed anything; it keeps no state.
"""

from contextlib import nullcontext

from openneutron.passes.batch_layers import batch_layers
from openneutron.passes.checks import check_is_static_eval, check_outputs, check_writes_nothing, parameters_stay
from openneutron.passes.copy_returned_joins import copy_returned_joins
from openneutron.passes.decompose import decompose
from openneutron.passes.divide_after_sums import divide_after_sums
from openneutron.passes.fold_arithmetic import fold_arithmetic
from openneutron.passes.fold_batch_norm import fold_batch_norm
from openneutron.passes.fold_constants import fold_constants
from openneutron.passes.fold_norm_affine import fold_norm_affine
from openneutron.passes.forget_strides import forget_strides
from openneutron.passes.functionalize import functionalize
from openneutron.passes.hold_states import end_gradients, hold_states
from openneutron.passes.inline_regions import inline_regions
from openneutron.passes.merge_phases import merge_phases
from openneutron.passes.move_activations import move_activations
from openneutron.passes.name_bad_inputs import name_bad_inputs
from openneutron.passes.name_convolutions import name_convolutions
from openneutron.passes.name_numbers import name_numbers
from openneutron.passes.nest_concatenations import nest_concatenations
from openneutron.passes.read_parts import read_parts
from openneutron.passes.recognize import recognize
from openneutron.passes.remove_batch_counts import remove_batch_counts
from openneutron.passes.remove_dead_channels import remove_dead_channels
from openneutron.passes.remove_dead_operators import remove_dead_operators
from openneutron.passes.remove_empties import remove_empties
from openneutron.passes.remove_expands import remove_expands
from openneutron.passes.remove_identities import remove_identities
from openneutron.passes.scale_before_masks import scale_before_masks
from openneutron.passes.share_results import share_results
from openneutron.passes.split_padded_products import split_padded_products

__all__ = [
    "batch_layers", "check_is_static_eval", "check_outputs", "check_writes_nothing", "copy_returned_joins", "decompose",
    "divide_after_sums",
    "fold_arithmetic", "fold_batch_norm", "fold_constants", "fold_norm_affine", "forget_strides", "functionalize",
    "hold_states", "inline_regions", "merge_phases", "move_activations", "name_bad_inputs", "name_convolutions",
    "name_numbers", "nest_concatenations", "prepare", "read_parts", "recognize", "remove_batch_counts",
    "remove_dead_channels", "remove_dead_operators", "remove_empties", "remove_expands", "remove_identities",
    "scale_before_masks", "share_results", "split_padded_products",
]  # fmt: skip

from collections.abc import Callable

from torch.fx import GraphModule, Node

from openneutron.targets import NeutronTarget


def prepare(
    module: GraphModule,
    target: NeutronTarget,
    *,
    training: bool = False,
    stays: Callable[[Node], bool] = lambda _: False,
) -> GraphModule:
    """All passes that any quantization starts with, in their order. Linear in the nodes of the graph.

    `stays` says which operators are to stay in float: they are not written with others, nor made part of any.

    No batch norm in eval mode is left: torchao's `convert_pt2e` takes 10 s for a model that has one. With `training`,
    parameters stay what they are, and what train mode has of its own stays too: it is the quantizer's to take out.

    Raises `ModelError` for a model that cannot be quantized as a whole: a dtype other than float32, writes in place
    that other values would see, and, unless `training`, train mode and dynamic shapes.
    """
    keeping_parameters = parameters_stay if training else nullcontext
    inline_regions(module, training=training)
    check_is_static_eval(module, training=training)
    check_outputs(module)
    name_convolutions(module)
    name_bad_inputs(module)
    remove_batch_counts(module)
    hold_states(module)
    functionalize(module)
    if training:
        end_gradients(module)
    check_writes_nothing(module)
    remove_dead_operators(module)
    forget_strides(module)
    remove_empties(module)
    fold_constants(module, training=training)
    batch_layers(module, stays)
    remove_identities(module, training=training)
    if not training:
        share_results(module, stays)
    merge_phases(module, target)
    split_padded_products(module, target, stays)
    with keeping_parameters(module):
        scale_before_masks(module, stays, training=training)
        recognize(module, target, stays)
    if not training:
        fold_norm_affine(module)
    with keeping_parameters(module):
        decomposed = decompose(module, target, stays, training=training)
    if decomposed:
        batch_layers(module, stays)
        fold_constants(module, training=training)
        remove_identities(module, training=training)
    if not training:
        share_results(module, stays)
        divide_after_sums(module, target, stays)
    read_parts(module)
    remove_expands(module)
    fold_batch_norm(module, training=training)
    with keeping_parameters(module):
        name_numbers(module)
    move_activations(module, target, stays)
    nest_concatenations(module)
    copy_returned_joins(module)
    if not training:
        fold_arithmetic(module, stays)
        remove_dead_channels(module)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module

"""Recipes: which methods get back what int8 loses, and in which order."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from openneutron.constants import constant_of, insert_constant
from openneutron.errors import OptionError
from openneutron.fx import arguments, set_argument
from openneutron.ops.layers import CONVOLUTION, LINEAR, TRANSPOSED, layer_kind
from openneutron.passes.equalize import equalize
from openneutron.recovery.absorb_biases import absorb_biases
from openneutron.recovery.channel_ranges import channel_ranges
from openneutron.recovery.correct_biases import correct_biases
from openneutron.recovery.round_weights import round_weights
from openneutron.recovery.silence import silence_channels
from openneutron.recovery.walk import Samples

__all__ = ["RECIPES", "check_recipe", "give_biases", "recover_converted", "recover_exported"]

RECIPES = ("fast", "auto")
# With fewer samples, what they never woke or never brought to its clip says nothing of other inputs.
ENOUGH_SAMPLES = 32


def check_recipe(recipe: str | None) -> None:
    """Raise `OptionError` for a name that no recipe has."""
    if recipe is not None and recipe not in RECIPES:
        raise OptionError(f"recover is one of {', '.join(map(repr, RECIPES))}, or None, not {recipe!r}.")


def recover_exported(module: GraphModule, samples: Samples, *, equalizes: bool = True) -> GraphModule:
    """What is done to the float graph, in place, between `transform_for_annotation` and `prepare_pt2e`.

    The function stays as it is on `samples`: silent channels are zeroed, biases absorbed, channels equalized as far as
    the clip of a relu6 allows. With fewer samples than `ENOUGH_SAMPLES` it stays as it is on all inputs: channels are
    equalized where no clip is, and nothing else is done. Without `equalizes`, they are not.
    """
    give_biases(module)
    ranges = None
    if len(samples) >= ENOUGH_SAMPLES:
        ranges = channel_ranges(module, samples)
        silence_channels(module, ranges)
        ranges = absorb_biases(module, ranges)
    if equalizes:
        equalize(module, ranges)
    return module


def recover_converted(converted: GraphModule, reference: GraphModule, samples: Samples, recipe: str) -> GraphModule:
    """What is done to the converted module, in place.

    `reference` is the float graph that was prepared. "fast" corrects biases, "auto" rounds weights anew as well.
    """
    check_recipe(recipe)
    return (correct_biases if recipe == "fast" else round_weights)(converted, reference, samples)


def give_biases(module: GraphModule) -> None:
    """Give each convolution and linear without a bias one of zeros: TFLite's operators have one in any case."""
    for node in module.graph.nodes:
        kind = layer_kind(node)
        args = arguments(node)
        weight = constant_of(module, args["weight"]) if kind in (CONVOLUTION, LINEAR, TRANSPOSED) else None
        if weight is not None and args["bias"] is None:
            outputs = weight.shape[1] * args["groups"] if kind == TRANSPOSED else weight.shape[0]
            set_argument(node, "bias", insert_constant(module, node, torch.zeros(outputs), "bias"))
    module.recompile()

"""Recipes: which methods get back what int8 loses, and in which order."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch.fx import GraphModule

from openneutron.calibration import CalibrationOptions, calibrate
from openneutron.core.constants import constant_of, insert_constant
from openneutron.core.fx import arguments, set_argument
from openneutron.errors import OptionError
from openneutron.ops.layers import CONVOLUTION, LINEAR, TRANSPOSED, layer_kind
from openneutron.passes.equalize import equalize
from openneutron.quantizer import DistributionObserver, NeutronQuantizer
from openneutron.quantizer.ranges import RULES
from openneutron.recovery.absorb_biases import absorb_biases
from openneutron.recovery.channel_ranges import channel_ranges
from openneutron.recovery.correct_biases import correct_biases
from openneutron.recovery.round_weights import MOST_INPUTS, round_weights
from openneutron.recovery.silence import silence_channels
from openneutron.recovery.walk import Samples, evenly

__all__ = [
    "AUTO", "BEST", "ENOUGH_SAMPLES", "FAST", "RECIPES", "Recipe", "give_biases", "quantized_by", "recipe_of",
    "recover_converted", "recover_exported",
]  # fmt: skip

# With fewer samples, what they never woke or never brought to its clip says nothing of other inputs.
ENOUGH_SAMPLES = 32
MENDED = ("weights", "biases", None)
# What is mended in little time is mended by so many samples, and weights of outputs with more inputs stay.
FEW_SAMPLES = 50
FEW_INPUTS = 2304


@dataclass(frozen=True)
class Recipe:
    """What is done so that int8 loses little. Raises `OptionError` for what there is not.

    `mends` is what is changed after conversion: "weights" (rounded anew; biases, too), "biases" (corrected) or None.
    `range_by` is the rule for ranges of activations, one of `quantizer.ranges.RULES`; None leaves that to the
    quantizer's observer. `equalizes` and `trusts_samples` are those of `recover_exported`. What is `thorough` mends
    by all samples; else `FEW_SAMPLES` of them do, and weights with more than `FEW_INPUTS` inputs of an output stay.
    """

    mends: str | None = "weights"
    range_by: str | None = None
    equalizes: bool = True
    trusts_samples: bool = True
    thorough: bool = True

    def __post_init__(self) -> None:
        for name, known in (("mends", MENDED), ("range_by", (*RULES, None))):
            if getattr(self, name) not in known:
                raise OptionError(f"{name} is one of {', '.join(map(repr, known))}, not {getattr(self, name)!r}.")
        for name in ("equalizes", "trusts_samples", "thorough"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} takes True or False, not {getattr(self, name)!r}.")


AUTO, FAST = Recipe(range_by="error"), Recipe(range_by="error", thorough=False)
BEST = "best"
RECIPES = {"fast": FAST, "auto": AUTO, BEST: None}
"""By what `quantize` calls them; that of "best" is found for each network."""


def recipe_of(recover: str | Recipe | None, *, observes: bool = False) -> Recipe | None:
    """The recipe that `quantize` is asked for; None for none, and for one that is to be found.

    Where an observer is given (`observes`), those with a name leave the ranges to it. Raises `OptionError` for anything
    else, and for a `Recipe` that decides on ranges beside an observer.
    """
    if recover is None:
        return None
    if isinstance(recover, Recipe):
        if observes and recover.range_by is not None:
            raise OptionError("The observer and range_by of the recipe both decide on ranges. Leave one of them out.")
        return recover
    if not isinstance(recover, str) or recover not in RECIPES:
        raise OptionError(f"recover is one of {', '.join(map(repr, RECIPES))}, a Recipe, or None, not {recover!r}.")
    recipe = RECIPES[recover]
    return replace(recipe, range_by=None) if observes and recipe is not None else recipe


@torch.no_grad()
def quantized_by(
    recipe: Recipe | None,
    exported: GraphModule,
    quantizer: NeutronQuantizer,
    samples: Samples,
    running: CalibrationOptions,
) -> tuple[GraphModule, GraphModule]:
    """The converted module, and the float graph that it was made of.

    `exported` has been through `quantizer.transform_for_annotation`, and stays as it is.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    module = copy.deepcopy(exported)
    if recipe is not None:
        recover_exported(module, samples, equalizes=recipe.equalizes, trusts_samples=recipe.trusts_samples)
    reference = copy.deepcopy(module)
    rule = None if recipe is None else recipe.range_by
    prepared = prepare_pt2e(module, quantizer if rule is None else _with_rule(quantizer, rule))
    calibrate(prepared, samples, running)
    converted = convert_pt2e(prepared)
    if recipe is not None:
        recover_converted(converted, reference, samples, recipe, progress=running.progress)
    return converted, reference


def _with_rule(quantizer: NeutronQuantizer, rule: str) -> NeutronQuantizer:
    changed = copy.copy(quantizer)
    changed.observer = DistributionObserver.with_args(range_by=rule)
    return changed


def recover_exported(
    module: GraphModule, samples: Samples, *, equalizes: bool = True, trusts_samples: bool = True
) -> GraphModule:
    """What is done to the float graph, in place, between `transform_for_annotation` and `prepare_pt2e`.

    The function stays as it is on `samples`: silent channels are zeroed, biases absorbed, channels equalized as far as
    the clip of a relu6 allows. With fewer samples than `ENOUGH_SAMPLES`, and where they are not to be trusted with
    that, it stays as it is on all inputs: channels are equalized where no clip is, and nothing else is done. Without
    `equalizes`, they are not.
    """
    give_biases(module)
    ranges = None
    if trusts_samples and len(samples) >= ENOUGH_SAMPLES:
        ranges = channel_ranges(module, samples)
        silence_channels(module, ranges)
        ranges = absorb_biases(module, ranges)
    if equalizes:
        equalize(module, ranges)
    return module


def recover_converted(
    converted: GraphModule, reference: GraphModule, samples: Samples, recipe: Recipe, *, progress: bool | None = False
) -> GraphModule:
    """What is done to the converted module, in place; `reference` is the float graph that was prepared."""
    if recipe.mends is None:
        return converted
    if not recipe.thorough:
        samples = evenly(samples, FEW_SAMPLES)
    if recipe.mends == "biases":
        return correct_biases(converted, reference, samples, progress=progress)
    most_inputs = MOST_INPUTS if recipe.thorough else FEW_INPUTS
    return round_weights(converted, reference, samples, most_inputs=most_inputs, progress=progress)


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

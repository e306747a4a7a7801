"""Recipes: selections of the methods that recover accuracy, and the order in which they are applied."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.fx import GraphModule, Node

from openneutron.calibration import CalibrationOptions, calibrate
from openneutron.core.fx import arguments, set_argument
from openneutron.core.generated_code import code_on_demand
from openneutron.errors import OptionError
from openneutron.model.state import states_of, store_of
from openneutron.ops.declared import layer_kind
from openneutron.ops.layers import constant_layer
from openneutron.passes.equalize import equalize
from openneutron.quantizer import DistributionObserver, Int8Quantizer
from openneutron.quantizer.cell_scales import scale_as_converted
from openneutron.quantizer.conversion import convert, insert_observers
from openneutron.quantizer.layer_options import PER_CHANNEL
from openneutron.quantizer.ranges import RULES, rule_named
from openneutron.recovery.absorb_biases import absorb_biases
from openneutron.recovery.candidate_limits import select_candidate_limits
from openneutron.recovery.candidate_rows import scale_candidate_rows
from openneutron.recovery.cell_limits import select_cell_limits
from openneutron.recovery.channel_ranges import channel_ranges
from openneutron.recovery.correct_biases import correct_biases
from openneutron.recovery.gptq_rounding import MOST_INPUTS, round_weights_by_gptq
from openneutron.recovery.layerwise import Samples, evenly_spaced
from openneutron.recovery.zero_inactive_channels import zero_inactive_channels

__all__ = [
    "AUTO", "BEST", "ENOUGH_SAMPLES", "FAST", "RECIPES", "Recipe", "copy_that_shares_constants", "give_biases",
    "give_biases_as_converted", "quantize_by_recipe", "recipe_of", "recover_converted", "recover_exported",
    "was_recovered",
]  # fmt: skip

# With fewer samples, it may be by chance that a channel is never active or that a clamp never clips.
ENOUGH_SAMPLES = 32
CORRECTIONS = ("weights", "biases", None)
# Limits of corrections without `use_all_samples`: the largest number of samples, and the largest number of weights per
# output channel of a layer that GPTQ rounds.
FEW_SAMPLES = 50
FEW_INPUTS = 2304
_RECOVERED = "openneutron.recovered"


@dataclass(frozen=True)
class Recipe:
    """A selection of recovery methods. Raises `OptionError` for an invalid value."""

    correction: str | None = "weights"
    """The correction of the converted module. "weights" rounds weights by GPTQ and corrects biases; "biases" only
    corrects biases; None does neither.
    """
    range_by: str | None = None
    """The rule for ranges of activations, one of `quantizer.ranges.RULES`; None keeps the quantizer's observer."""
    equalizes: bool = True
    """Whether weights are equalized between layers (see `recover_exported`)."""
    trusts_samples: bool = True
    """Whether outputs may change for inputs that no sample resembles (see `recover_exported`)."""
    use_all_samples: bool = True
    """Whether the correction uses all samples. Otherwise it uses at most `FEW_SAMPLES`, and does not round layers with
    more than `FEW_INPUTS` weights per output channel by GPTQ.
    """
    trains_recurrent_layers: bool = True
    """Whether `quantize` trains the layers of recurrent networks on the samples, after the correction of weights."""

    def __post_init__(self) -> None:
        if isinstance(self.range_by, str):
            object.__setattr__(self, "range_by", rule_named(self.range_by))
        for name, known in (("correction", CORRECTIONS), ("range_by", (*RULES, None))):
            if getattr(self, name) not in known:
                raise OptionError(f"{name} must be one of {', '.join(map(repr, known))}, not {getattr(self, name)!r}.")
        for name in ("equalizes", "trusts_samples", "use_all_samples", "trains_recurrent_layers"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} takes True or False, not {getattr(self, name)!r}.")


AUTO, FAST = Recipe(range_by="mse"), Recipe(range_by="mse", use_all_samples=False, trains_recurrent_layers=False)
BEST = "best"
RECIPES = {"fast": FAST, "auto": AUTO, BEST: None}
"""Recipes by their names in `quantize`. The recipe of "best" is None, because a search finds it for each network."""


def recipe_of(recover: str | Recipe | None, *, observes: bool = False) -> Recipe | None:
    """Returns the recipe for the option `recover` of `quantize`; None for `None` and for "best".

    `observes` says that the user gave an observer; recipes with a name then leave the ranges to the observer. Raises
    `OptionError` for an unknown recipe, and for a `Recipe` with a `range_by` if an observer is given.
    """
    if recover is None:
        return None
    if isinstance(recover, Recipe):
        if observes and recover.range_by is not None:
            raise OptionError("The observer and range_by of the recipe both select ranges. Leave one of them out.")
        return recover
    if not isinstance(recover, str) or recover not in RECIPES:
        raise OptionError(
            f"recover must be one of {', '.join(map(repr, RECIPES))}, a Recipe, or None, not {recover!r}."
        )
    recipe = RECIPES[recover]
    return replace(recipe, range_by=None) if observes and recipe is not None else recipe


@torch.no_grad()
def quantize_by_recipe(
    recipe: Recipe | None,
    exported: GraphModule,
    quantizer: Int8Quantizer,
    samples: Samples,
    running: CalibrationOptions,
) -> tuple[GraphModule, GraphModule]:
    """Quantizes `exported` with a recipe. Returns the converted module and the float graph before annotation.

    `exported` comes from `quantizer.prepare_graph`. It is copied, not changed.
    """
    with code_on_demand():
        module = copy.deepcopy(exported)
    if recipe is not None:
        recover_exported(
            module, samples, equalizes=recipe.equalizes, trusts_samples=recipe.trusts_samples,
            has_one_scale=lambda node: quantizer.layers.granularity(node) != PER_CHANNEL,
        )  # fmt: skip
    rule = None if recipe is None else recipe.range_by
    observer = None if rule is None else DistributionObserver.with_args(range_by=rule)
    with code_on_demand():
        reference = copy_that_shares_constants(module)  # it takes inputs by name, which torch.export's module refuses
        prepared = insert_observers(module, quantizer.replace(takes_prepared_graphs=True, observer=observer))
    calibrate(prepared, samples, running)
    with code_on_demand():
        converted = convert(prepared)
    for result in (reference, converted):
        result.recompile()
    scale_as_converted(reference, converted)
    if recipe is not None:
        recover_converted(converted, reference, samples, recipe, progress=running.progress)
    return converted, reference


def copy_that_shares_constants(module: GraphModule) -> GraphModule:
    """Returns a copy of a float graph whose constants are the tensors of `module`, except those that store states.

    No pass writes to a constant: it replaces the constant by another one. Runs write to states.
    """
    stores = {str(store_of(state).target) for state in states_of(module.graph)}
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for name, tensor in tensors if name not in stores})


def recover_exported(
    module: GraphModule,
    samples: Samples,
    *,
    equalizes: bool = True,
    trusts_samples: bool = True,
    has_one_scale: Callable[[Node], bool] = lambda _: True,
) -> GraphModule:
    """Applies recovery methods to the float graph, in place, between `transform_for_annotation` and `prepare_pt2e`.

    1. Gives each layer a bias.
    2. Zeroes inactive channels and absorbs high biases.
    3. Equalizes channels, if `equalizes` is set. A channel before a relu6 or another clamp is scaled only if its
       values on `samples` are below the upper limit of the clamp, and only so far that they do not exceed it.
    4. Selects the ranges of the candidates of LSTMs, scales the rows of their weights where `has_one_scale` says that a
       linear has one scale for all rows, and selects the ranges of the cell states.

    The outputs on `samples` do not change, except for float rounding. Without `trusts_samples`, or with fewer samples
    than `ENOUGH_SAMPLES`, the outputs on all inputs do not change: step 2 is skipped, and step 3 does not scale
    channels before a clamp. Notes in `module.meta` that it was applied (`was_recovered`).
    """
    module.meta[_RECOVERED] = True
    give_biases(module)
    ranges = None
    if trusts_samples and len(samples) >= ENOUGH_SAMPLES:
        ranges = channel_ranges(module, samples)
        zero_inactive_channels(module, ranges)
        ranges = absorb_biases(module, ranges)
    if equalizes:
        equalize(module, ranges)
    select_candidate_limits(module, samples)
    scale_candidate_rows(module, has_one_scale)
    select_cell_limits(module, samples)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def was_recovered(module: GraphModule) -> bool:
    """Returns whether `recover_exported` was applied to a float graph."""
    return bool(module.meta.get(_RECOVERED))


def recover_converted(
    converted: GraphModule, reference: GraphModule, samples: Samples, recipe: Recipe, *, progress: bool | None = False
) -> GraphModule:
    """Applies the correction of a recipe to the converted module in place.

    `reference` is the float graph before `prepare_pt2e`.
    """
    if recipe.correction is None:
        return converted
    if not recipe.use_all_samples:
        samples = evenly_spaced(samples, FEW_SAMPLES)
    if recipe.correction == "biases":
        return correct_biases(converted, reference, samples, progress=progress)
    most_inputs = MOST_INPUTS if recipe.use_all_samples else FEW_INPUTS
    return round_weights_by_gptq(converted, reference, samples, most_inputs=most_inputs, progress=progress)


def give_biases(module: GraphModule) -> None:
    """Gives each convolution and linear without a bias a bias of zeros. TFLite's operators have one in any case.

    Layers that read one weight get one bias.
    """
    given: dict[tuple[str, int], Node] = {}
    for node in module.graph.nodes:
        layer = constant_layer(module, node)
        if layer is None or layer.bias is not None:
            continue
        weight = str(arguments(node)["weight"].target), layer.outputs
        if weight in given:
            set_argument(node, "bias", given[weight])
        else:
            layer.replace(bias=torch.zeros(layer.outputs))
            given[weight] = arguments(node)["bias"]
    module.recompile()


def give_biases_as_converted(reference: GraphModule, converted: GraphModule) -> None:
    """Gives each layer of the float graph `reference` a bias, if layers of `converted` have biases that it lacks.

    Linear in nodes.
    """
    layers = [node for node in converted.graph.nodes if layer_kind(node) is not None]
    biased = {node.name for node in layers if arguments(node)["bias"] is not None}
    own = (node for node in reference.graph.nodes if layer_kind(node) is not None and node.name in biased)
    if any(arguments(node)["bias"] is None for node in own):
        give_biases(reference)

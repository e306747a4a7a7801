"""Trains the recurrent layers of a quantized model on calibration inputs, as the last step of recovery.

A rounding error in a recurrent layer changes all later steps, so the methods that correct one layer after the other
cannot compensate it. Training changes the weights of all steps together, towards the states that the float network has
after each step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import replace

from torch.fx import GraphModule, Node

from openneutron.core.fx import arguments, dtype_of, is_dequantize, is_operator, is_quantize, shape_of
from openneutron.core.progress import progress_bar
from openneutron.model.state import has_state
from openneutron.quantized_model import QuantizedModel
from openneutron.recovery.layerwise import Samples
from openneutron.recovery.weighted_layers import WeightedLayer, layers_of
from openneutron.training.distillation import held_out_of, others_than, train_towards
from openneutron.training.layer_states import compare_states, recurrent_states
from openneutron.training.mixed_samples import MixedSamples
from openneutron.training.trainable import TrainableModel

__all__ = ["BATCH", "FEWEST_SAMPLES", "RATE", "train_recurrent_layers"]

_LOGGER = logging.getLogger(__name__)
# With fewer samples, the weights would fit them by chance.
FEWEST_SAMPLES = 16
STEPS, FEWEST_STEPS, BATCH = 240, 40, 16
# The change of a weight in one update, in int8 steps.
RATE = 0.04
# Models that are more accurate than ENOUGH_DB are not trained, and a mean gain below LEAST_GAIN_DB is not used: the few
# held-out samples do not show whether other inputs gain as well.
ENOUGH_DB, LEAST_GAIN_DB = 25.0, 0.2
# One of HELD_OUT_EVERY samples measures the gain. Training uses the others, and MIXED weighted means of two of them.
HELD_OUT_EVERY, MIXED = 4, 480
# Limits of the multiplications and of the operators that all updates compute forwards; backwards, they compute twice as
# many. They bound the time of the training to minutes.
MOST_PRODUCTS, MOST_OPERATORS = 3e11, 6e5
# Limit in bytes of the values that a batch keeps for its gradients: each float32 value before and after rounding.
MEMORY, BYTES_OF_VALUE, SMALLEST_BATCH = 1 << 30, 8, 4
# Texts of the errors by which torch refuses an operator without a rule for batches or for gradients.
NO_RULE = ("Batching rule", "vmap:", "derivative for")


def train_recurrent_layers(
    quantized: QuantizedModel, samples: Samples, *, seconds: float = math.inf, progress: bool | None = False
) -> QuantizedModel:
    """Returns `quantized` with weights, biases and ranges that were trained towards its float graph.

    The loss compares the outputs and the states of recurrent layers. A quarter of `samples`, at most 64, is held out.
    The others and means of two of them (`MixedSamples`) are trained on. The result has the parameters at the end:
    those with the least loss on the few held-out samples would be better on these by chance. Training ends after
    `seconds` at the latest; without this limit, it is deterministic. `progress` shows a progress bar; None shows
    it if stderr is a terminal.

    Returns `quantized` itself if the mean SQNR of the outputs of the held-out samples is above `ENOUGH_DB`, or
    increases by less than `LEAST_GAIN_DB`; if no recurrent layer calls one weight several times; if the
    model has state or an operator without gradients; if there are fewer than `FEWEST_SAMPLES` samples; or if fewer than
    `FEWEST_STEPS` updates of `SMALLEST_BATCH` samples are within the limits of time and memory.
    """
    states = recurrent_states(quantized.module)
    if not states or quantized.reference is None or has_state(quantized.module) or len(samples) < FEWEST_SAMPLES:
        return quantized
    batch = _batch_within_memory(quantized.module)
    steps = _steps_within_limits(quantized.module, batch)
    if steps < FEWEST_STEPS or batch < SMALLEST_BATCH or seconds <= 0:
        _LOGGER.info("Recovery does not train the recurrent layers, because this would take long. Call distill().")
        return quantized
    module = TrainableModel(quantized)
    held_out = held_out_of(len(samples), HELD_OUT_EVERY)
    mixed = MixedSamples(samples, others_than(held_out, len(samples)), MIXED)
    comparison = compare_states(module, quantized.reference, states, mixed, held_out)
    try:
        if not comparison.has_gradient():
            _LOGGER.info("Recovery does not train the recurrent layers, because outputs and states have no gradient.")
            return quantized
        before = comparison.mean_sqnr(held_out, batch)
        if before > ENOUGH_DB:
            return quantized
        with progress_bar("Training recurrent layers", steps, progress) as advance:
            train_towards(
                module, comparison, seconds=seconds, steps=steps, rate=RATE, batch=batch, selects=False,
                after_step=lambda: advance(1),
            )  # fmt: skip
        after = comparison.mean_sqnr(held_out, batch)
    except RuntimeError as error:
        if not any(text in str(error) for text in NO_RULE):
            raise
        _LOGGER.info("Recovery does not train the recurrent layers, because an operator has no gradient: %s", error)
        return quantized
    _LOGGER.info("Training of recurrent layers: %.1f dB before, %.1f dB after, on held-out samples.", before, after)
    gains = after >= before + LEAST_GAIN_DB  # not if one is NaN
    return replace(quantized, module=module.converted()) if gains else quantized


def _batch_within_memory(module: GraphModule) -> int:
    """Returns the number of samples of a batch whose values are within `MEMORY`, at most `BATCH`. Linear in nodes."""
    values = sum(math.prod(shape_of(node)) for node in _operators(module) if dtype_of(node) is not None)
    return int(min(BATCH, MEMORY / max(values * BYTES_OF_VALUE, 1)))


def _steps_within_limits(module: GraphModule, batch: int) -> int:
    """Returns the number of updates within the limits of time, at most `STEPS`. Linear in nodes."""
    products = sum(_products(layer) for layer in layers_of(module))
    operators = sum(1 for _ in _operators(module))
    return int(min(STEPS, MOST_OPERATORS / max(operators, 1), MOST_PRODUCTS / max(products * batch, 1)))


def _products(layer: WeightedLayer) -> int:
    """Returns the number of multiplications of a layer."""
    positions = arguments(layer.node)["input"] if layer.is_transposed else layer.node
    return math.prod(shape_of(positions)) * layer.codes[0].numel()


def _operators(module: GraphModule) -> Iterator[Node]:
    for node in module.graph.nodes:
        if is_operator(node) and not is_quantize(node) and not is_dequantize(node):
            yield node

"""Trains the recurrent layers of a quantized model on calibration inputs, as the last step of recovery.

A rounding error in a recurrent layer changes all later steps, so the methods that correct one layer after the other
cannot compensate it. Training changes the weights of all steps together, towards the states that the float network has
after each step.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import torch
from torch.fx import GraphModule

from openneutron.core.fx import is_dequantize, is_operator, is_quantize, shape_of
from openneutron.core.progress import progress_bar
from openneutron.model.state import has_state
from openneutron.quantized_model import QuantizedModel
from openneutron.recovery.layerwise import Samples
from openneutron.recovery.weighted_layers import layers_of
from openneutron.training.distillation import ComparedValues, train_towards
from openneutron.training.layer_states import compare_states, recurrent_states
from openneutron.training.trainable import TrainableModel

__all__ = ["FEWEST_SAMPLES", "train_recurrent_layers"]

_LOGGER = logging.getLogger(__name__)
# With fewer samples, the weights would fit them by chance.
FEWEST_SAMPLES = 16
STEPS, FEWEST_STEPS, BATCH = 120, 40, 16
# The change of a weight in one update, in int8 steps.
RATE = 0.04
# Limits of the multiplications and of the operators that all steps compute forwards; backwards, they compute twice as
# many. They bound the time of the training to minutes.
MOST_PRODUCTS, MOST_OPERATORS = 3e11, 6e5


def train_recurrent_layers(
    quantized: QuantizedModel, samples: Samples, *, progress: bool | None = False
) -> QuantizedModel:
    """Returns `quantized` with weights, biases and ranges that were trained towards its float graph.

    The loss compares the outputs and the states of recurrent layers. Every eighth of `samples` is held out, and the
    result has the parameters with the least loss on these. Deterministic. `progress` shows a progress bar; None shows
    it if stderr is a terminal.

    Returns `quantized` itself if no recurrent layer calls one weight several times, if the model has state or an
    operator without gradients, if there are fewer than `FEWEST_SAMPLES` samples, or if fewer than `FEWEST_STEPS`
    updates are within the limits.
    """
    states = recurrent_states(quantized.module)
    if not states or quantized.reference is None or has_state(quantized.module) or len(samples) < FEWEST_SAMPLES:
        return quantized
    steps = _steps_within_limits(quantized.module)
    if steps < FEWEST_STEPS:
        _LOGGER.info("Recovery does not train the recurrent layers, because this would take long. Call distill().")
        return quantized
    module = TrainableModel(quantized)
    comparison = compare_states(module, quantized.reference, states, samples)
    if not _has_gradients(module, comparison):
        return quantized
    with progress_bar("Training recurrent layers", steps, progress) as advance:
        result = train_towards(
            module, comparison, seconds=math.inf, steps=steps, rate=RATE, batch=BATCH,
            after_step=lambda: advance(1),
        )  # fmt: skip
    _LOGGER.info(
        "Training of recurrent layers: %.1f dB before, %.1f dB after, on held-out samples.",
        result.sqnr_before_db, result.sqnr_after_db,
    )  # fmt: skip
    return replace(quantized, module=module.converted())


def _has_gradients(module: TrainableModel, comparison: ComparedValues) -> bool:
    """Returns whether torch computes the gradients for a batch. The log says why not."""
    try:
        with torch.enable_grad():
            torch.autograd.backward(comparison.loss([0]))
    except RuntimeError as error:  # an operator without a rule for batches or for gradients
        _LOGGER.info("Recovery does not train the recurrent layers, because an operator has no gradient: %s", error)
        return False
    return any(parameter.grad is not None for parameter in module.parameters())


def _steps_within_limits(module: GraphModule) -> int:
    """Returns the number of updates within the limits, at most `STEPS`. Linear in nodes."""
    operators = sum(
        is_operator(node) and not is_quantize(node) and not is_dequantize(node) for node in module.graph.nodes
    )
    products = sum(math.prod(shape_of(layer.node)) * layer.codes[0].numel() for layer in layers_of(module))
    return int(min(STEPS, MOST_OPERATORS / max(operators, 1), MOST_PRODUCTS / max(products * BATCH, 1)))

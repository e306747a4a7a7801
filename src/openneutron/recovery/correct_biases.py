"""Bias correction: what rounding shifts on average, the bias takes back.

Rounding the weights of a layer, and the values that it reads, shifts the mean of each of its outputs. Unlike noise, a
shift does not average out in later layers, and it costs nothing to correct, because the bias is there anyway
(Finkelstein et al. 2019; Nagel et al. 2019, section 4.2, whose empirical form this is: layer by layer, each with the
error that the corrected ones before it leave).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import GraphModule

from openneutron.recovery.walk import Reading, Samples, samples_that_fit, walk
from openneutron.recovery.weighted_layers import Layer

__all__ = ["correct_bias", "correct_biases"]


def correct_biases(
    converted: GraphModule, reference: GraphModule, samples: Samples, *, progress: bool | None = False
) -> GraphModule:
    """Correct all biases of a converted module, in place; layers without one stay.

    `reference` is the float graph that was prepared, `samples` are calibration inputs. `progress` shows a bar;
    None does in a terminal. One pass over both graphs, linear in nodes and samples. Raises `ModelError` where the two
    graphs do not belong together.
    """
    walk(reference, converted, samples_that_fit(reference, samples), correct_bias, progress)
    return converted


def correct_bias(layer: Layer, reading: Reading) -> None:
    """Make the mean of each output of `layer` what it is in the float graph."""
    bias = layer.real_bias
    if bias is None:
        return
    weight = layer.real_weight
    without_bias = (layer.run(values, weight, None) for values in reading.quantized)
    layer.set_bias(_mean(layer, reading.wanted) - _mean(layer, without_bias))


def _mean(layer: Layer, outputs: Iterable[torch.Tensor]) -> torch.Tensor:
    """[outputs] over all positions of all samples, in double."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for values in outputs:
        positions = layer.by_output(values)
        total = total + positions.sum(0, dtype=torch.float64)
        count += len(positions)
    return total / count

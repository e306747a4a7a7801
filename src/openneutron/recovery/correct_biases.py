"""Bias correction: adds the mean error that rounding causes to the bias.

Rounding the weights and inputs of a layer shifts the mean of each of its outputs. A shift does not average out in later
layers. Correcting it costs nothing at run time, because the layer has a bias in any case (Finkelstein et al. 2019;
Nagel et al. 2019, section 4.2). This is the empirical form: it corrects layer by layer, and measures each layer with
the error that remains after the corrections of earlier layers.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import GraphModule

from openneutron.recovery.layerwise import LayerIO, Samples, run_layerwise, samples_within_memory
from openneutron.recovery.weighted_layers import WeightedLayer

__all__ = ["correct_bias", "correct_biases"]


def correct_biases(
    converted: GraphModule, reference: GraphModule, samples: Samples, *, progress: bool | None = False
) -> GraphModule:
    """Corrects all biases of a converted module in place. Skips layers without a bias.

    `reference` is the float graph before `prepare_pt2e`, `samples` are calibration inputs. `progress` shows a progress
    bar; None shows it if stderr is a terminal. Makes one pass over both graphs, linear in nodes and samples. Raises
    `ModelError` if the two graphs are not of the same model.
    """
    run_layerwise(reference, converted, samples_within_memory(reference, samples), correct_bias, progress)
    return converted


def correct_bias(layer: WeightedLayer, layer_io: LayerIO) -> None:
    """Changes the bias so that the mean of each output channel equals the mean in the float graph."""
    bias = layer.real_bias
    if bias is None:
        return
    weight = layer.real_weight
    without_bias = (layer.run(values, weight, None) for values in layer_io.quantized)
    layer.set_bias(_mean(layer, layer_io.wanted) - _mean(layer, without_bias))


def _mean(layer: WeightedLayer, outputs: Iterable[torch.Tensor]) -> torch.Tensor:
    """Returns the mean of each output channel [outputs] over all positions of all samples, in double."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for values in outputs:
        positions = layer.by_output(values)
        total = total + positions.sum(0, dtype=torch.float64)
        count += len(positions)
    return total / count

"""Bias correction: adds the mean error that rounding causes to the bias.

Rounding the weights and inputs of a layer shifts the mean of each of its outputs. A shift does not average out in later
layers. Correcting it costs nothing at run time, because the layer has a bias in any case (Finkelstein et al. 2019;
Nagel et al. 2019, section 4.2). This is the empirical form: it corrects layer by layer, and measures each layer with
the error that remains after the corrections of earlier layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.fx import GraphModule

from openneutron.core.overflow import without_overflow
from openneutron.recovery.batches import batches_that_run
from openneutron.recovery.layerwise import LayerIO, Samples, run_layerwise, samples_within_memory
from openneutron.recovery.shared_layers import SharedLayer
from openneutron.recovery.weighted_layers import WeightedLayer

__all__ = ["PooledBiases", "correct_bias", "correct_biases"]


def correct_biases(
    converted: GraphModule, reference: GraphModule, samples: Samples, *, progress: bool | None = False
) -> GraphModule:
    """Corrects all biases of a converted module in place. Skips layers without a bias.

    `reference` is the float graph before `prepare_pt2e`, `samples` are calibration inputs. `progress` shows a progress
    bar; None shows it if stderr is a terminal. Makes one pass over both graphs, linear in nodes and samples. Raises
    `ModelError` if the two graphs are not of the same model.
    """
    used = samples_within_memory(reference, samples)
    form = batches_that_run(reference, used)
    run_layerwise(reference, converted, used, correct_bias, PooledBiases, form=form, progress=progress)
    return converted


def correct_bias(layer: WeightedLayer, layer_io: LayerIO) -> list[torch.Tensor] | None:
    """Changes the bias so that the mean of each output channel equals the mean in the float graph.

    Returns the outputs with the changed bias; None for a layer without a bias.
    """
    if layer.bias is None:
        return None
    weight = layer.real_weight
    outputs = [layer.run(values, weight, None) for values in layer_io.quantized]
    layer.set_bias(_output_means(layer, layer_io.wanted) - _output_means(layer, outputs))
    bias = layer.real_bias
    assert bias is not None
    return [output.add_(layer.along_channels(bias, output)) for output in outputs]


class PooledBiases:
    """Corrects the biases of layers that share a weight.

    Layers whose biases have equal codes and scales get one bias, corrected by the mean error of all of them, so that
    the program stores it once. Layers with other biases are corrected separately.

    In a recurrent network, errors of the inputs come from the errors of the same layers at earlier steps. Correcting
    them at each step would add up, so only the shift by the rounded weights is corrected, on the float inputs.
    """

    def __init__(self, shared: SharedLayer) -> None:
        self._is_recurrent = shared.is_recurrent
        self._pools = [_PooledMeans(layers) for layers in _group_by_bias(shared.uses)]
        self._pool_of = {layer.node: means for means in self._pools for layer in means.layers}

    def add(self, layer: WeightedLayer, layer_io: LayerIO) -> None:
        """Adds the inputs and wanted outputs of `layer` to the means."""
        inputs = layer_io.real if self._is_recurrent else layer_io.quantized
        if layer.node in self._pool_of:
            self._pool_of[layer.node].add(layer, inputs, layer_io.wanted)

    def apply(self) -> None:
        """Changes the biases so that the mean of each output channel equals the mean in the float graph."""
        for means in self._pools:
            means.apply()


class _PooledMeans:
    """The mean error of `layers` with one weight and equal biases.

    The mean of a layer's outputs is linear in its weight. `inputs` holds the coefficients [groups, ...], the sums of
    the inputs that each weight of an output channel multiplies. The means are therefore known for any weight, without
    the inputs.
    """

    def __init__(self, layers: Sequence[WeightedLayer]) -> None:
        self.layers = layers
        self.wanted = self.inputs = torch.zeros((), dtype=torch.float64)
        self.count = 0

    def add(self, layer: WeightedLayer, inputs: Iterable[torch.Tensor], outputs: Iterable[torch.Tensor]) -> None:
        for values, wanted in zip(inputs, outputs, strict=True):
            positions = layer.by_output(wanted)
            self.wanted = self.wanted + positions.sum(0, dtype=torch.float64)
            self.inputs = self.inputs + without_overflow(lambda each: _input_sums(layer, each), values).double()
            self.count += len(positions)

    def apply(self) -> None:
        (layer, *_), weight = self.layers, self.layers[0].real_weight.double()
        if layer.is_transposed:  # [inputs, outputs of a group, ...]
            products = weight.unflatten(0, (layer.groups, -1)) * self.inputs.unflatten(0, (layer.groups, -1))
            sums = products.movedim(2, 1).flatten(2).sum(2).flatten()
        else:
            products = weight.unflatten(0, (layer.groups, -1)) * self.inputs[:, None]
            sums = products.flatten(2).sum(2).flatten()
        for each in self.layers:
            each.set_bias((self.wanted - sums) / self.count)


def _group_by_bias(layers: Sequence[WeightedLayer]) -> list[list[WeightedLayer]]:
    """Groups layers by the codes and the scale of their biases. Leaves out layers without a bias."""
    found: dict[tuple[bytes, bytes], list[WeightedLayer]] = {}
    for layer in layers:
        if layer.bias is not None:
            found.setdefault(layer.bias_bytes, []).append(layer)
    return list(found.values())


@torch.enable_grad()
def _input_sums(layer: WeightedLayer, values: torch.Tensor) -> torch.Tensor:
    """Returns, for each weight of the first output channel of each group, the sum of the inputs that it multiplies.

    These are the derivatives of the sum of the outputs with respect to the weights, of all groups along dimension 0.
    """
    weight = layer.codes
    one_each = weight[:, :1] if layer.is_transposed else weight[: layer.groups]
    variable = torch.zeros(one_each.shape, dtype=values.dtype, requires_grad=True)
    (sums,) = torch.autograd.grad(layer.run(values.detach(), variable, None).sum(), variable)
    return sums


def _output_means(layer: WeightedLayer, outputs: Iterable[torch.Tensor]) -> torch.Tensor:
    """Returns the mean of each output channel [outputs] over all positions of all samples, in double."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for values in outputs:
        channel = layer.channel_dim % values.dim()
        inner = [dim for dim in range(1, values.dim()) if dim != channel]
        # A sum in double of all values would copy them to double. The positions of a sample are summed in float32.
        sums = (without_overflow(lambda each, dims=inner: each.sum(dims), values) if inner else values).double()
        total = total + (sums.sum(0) if channel else sums)
        count += values.numel() // values.shape[channel]
    return total / count

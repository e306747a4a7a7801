"""Measures the accuracy of a quantized model layer by layer, and the share of the final error of each layer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from openneutron.accuracy import advice as rules
from openneutron.accuracy.advice import OutputSqnr
from openneutron.accuracy.compare import compare_layers
from openneutron.accuracy.given import given
from openneutron.accuracy.quantized_layers import QuantizedLayer, QuantizedLayers, find_layers
from openneutron.accuracy.recurrent_accuracy import measure_recurrent_layers, runs_of
from openneutron.accuracy.recurrent_layers import recurrent_layers
from openneutron.accuracy.replay import record
from openneutron.accuracy.result import Analysis
from openneutron.accuracy.shares import Treatment, float_outputs, noise_ratio, shares_of, to_float, weight_per_channel
from openneutron.accuracy.statistics import Histogram, Noise, Statistics, largest_codes, weak_channels
from openneutron.core.fx import modules_of, op_name, output_node, placeholders, source_of
from openneutron.core.locks import traces_alone
from openneutron.core.numbers import decibels
from openneutron.errors import ModelError, OptionError
from openneutron.ir.graph import QParams
from openneutron.model.data import Data
from openneutron.model.examples import arguments_of
from openneutron.model.exporting import as_module, check_eval, digests, export
from openneutron.model.state import Stream, samples_of
from openneutron.neutron_program import NeutronProgram
from openneutron.ops import OPERATORS
from openneutron.passes.equalize import was_equalized
from openneutron.quantized_model import QuantizedModel
from openneutron.quantizer import Int8Quantizer
from openneutron.quantizer.cell_scales import scale_as_converted
from openneutron.recovery.candidate_rows import scale_rows_as_converted
from openneutron.recovery.recipes import give_biases_as_converted
from openneutron.recovery.wide_inputs import layers_of_inputs, widen_as_converted
from openneutron.results.comparison import Comparison
from openneutron.results.layerwise_accuracy import Advice, Bins, LayerAccuracy
from openneutron.runtime.native import native_module

__all__ = ["Analysis", "LayerAccuracy", "Progress", "analyze"]

SAMPLES_OF_RECURRENT_LAYERS = 4
"""The number of samples on which recurrent layers are measured. Each of them has one state for each step."""

Progress = Callable[[int, int], None]
"""Called with the number of completed steps and of all steps. A step is a run of the network or of a part of it."""


@traces_alone
def analyze(
    model: Any,
    quantized: QuantizedModel | GraphModule | ExportedProgram,
    data: Data,
    *,
    transform: Callable[[Any], Any] | None = None,
    samples: int = 16,
    candidates: int = 32,
    share_samples: int = 16,
    quantizer: Int8Quantizer | None = None,
    program: NeutronProgram | bytes | str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Analysis:
    """Compares a quantized model with its float graph, layer by layer, and recommends remedies for the worst layers.

    `quantized` is a result of `quantize`, which contains the float graph, or a module from `convert_pt2e`. In the first
    case, `model` is None or the model that was quantized, in any form that `quantize` takes. In the second case,
    `model` is the model that was exported, and `quantizer` is the quantizer that annotated it, if it had options
    (`layers`, a target). `data` and `transform` are as for the calibration data of `quantize`; labels after the inputs
    are ignored. The analysis uses the first `samples`.

    The analysis measures:

    1. Three SQNRs of the outputs: with everything quantized, with only weights and biases quantized, and with only
       activations quantized.
    2. The SQNR of each layer's output: with the noise of all layers before it, with only its own noise, with only
       weights quantized in the network, and with only activations.
    3. The share of the final error that disappears if this layer alone is in float: on the first `share_samples`, for
       the `candidates` layers with the most noise of their own.
    4. For each recurrent layer with unrolled steps (LSTM, GRU, cells in a loop), on 4 samples: the share of the error
       that all its steps cause, the SQNR of each step, what states, gates and weights cost, and what options gain
       (`Analysis.recurrent`).
    5. With a `program`, the difference between module and program, layer by layer, on `share_samples` (see
       `compare_layers`, which has its own errors).

    `progress` is called after each step. Time is samples x nodes + candidates x share_samples x nodes after the
    candidate. Memory holds all values of one sample.

    Raises `InputError` for data that do not fit the model, `ModelError` for a module that is not quantized or was not
    made of `model`, `OptionError` for numbers that are not positive, and, with a `program`, `NativeModuleError` if
    the native module is not installed.
    """
    if program is not None:
        native_module()
    _check_numbers(samples=samples, candidates=candidates, share_samples=share_samples)
    read = given(quantized, data, samples, transform)
    quantized, streams = read.quantized, read.streams
    reference = _reference_graph(model, quantized, quantizer, read.first)
    found = find_layers(read.module, reference, _target(quantized, quantizer))
    inputs = samples_of(reference, streams)
    tried = inputs[:share_samples]
    loops = recurrent_layers(found)
    recurrent_samples = min(share_samples, SAMPLES_OF_RECURRENT_LAYERS, len(inputs)) if loops else 0
    runs = recurrent_samples * runs_of(found, loops)
    steps = _Steps(progress, len(inputs) + len(tried) * min(candidates, len(found.layers)) + runs)
    statistics = [Statistics(layer) for layer in found.layers]
    noise = _gather_statistics(found, statistics, inputs, steps)

    noisiest = [one.layer for one in sorted(statistics, key=lambda one: one.own.sqnr_db)[:candidates]]
    shares = _error_shares(found, noisiest, tried, steps)
    rows = {one.layer: _layer_accuracy(position, one, shares.get(one.layer)) for position, one in enumerate(statistics)}
    layers = tuple(sorted(rows.values(), key=_worst_first))
    kept = OutputSqnr(*(decibels(noise_ratio(outputs) / len(outputs)) for outputs in noise))
    learned_rounding = _has_learned_rounding(quantized)
    recurrent = measure_recurrent_layers(
        found,
        loops,
        {one.layer: one for one in statistics},
        inputs[:recurrent_samples],
        steps.advance,
        learned_rounding=learned_rounding,
    )
    step_nodes = {node for one in recurrent for node in one.nodes}
    worst = rules.layers_to_treat([layer for layer in layers if layer.node not in step_nodes], kept)
    return Analysis(
        layers=layers,
        output_sqnr_db=kept.output_db,
        weights_sqnr_db=kept.weights_db,
        activations_sqnr_db=kept.activations_db,
        samples=len(inputs),
        share_samples=len(tried),
        verdict=rules.verdict(worst, kept, recurrent, learned_rounding=learned_rounding),
        advice=_advice(worst, found, rows, tried, learned_rounding=learned_rounding),
        comparison=None if program is None else _compare_with_program(quantized, program, streams, len(tried)),
        recurrent=recurrent,
    )


def _check_numbers(**numbers: int) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise OptionError(f"{name} must be a positive integer, not {number!r}.")


def _has_learned_rounding(quantized: QuantizedModel | GraphModule) -> bool:
    recipe = quantized.recipe if isinstance(quantized, QuantizedModel) else None
    return recipe is not None and recipe.correction == "weights"


def _error_shares(
    found: QuantizedLayers, layers: Sequence[QuantizedLayer], samples: Sequence[Any], steps: _Steps
) -> dict[QuantizedLayer, float | None]:
    """Returns the share of the final error that disappears if this layer alone is in float, for each of `layers`."""
    treated: list[tuple[QuantizedLayer, Treatment]] = [(layer, to_float) for layer in layers]
    return dict(zip(layers, shares_of(found, treated, samples, steps.advance), strict=True))


def _compare_with_program(
    quantized: QuantizedModel | GraphModule, program: Any, streams: Sequence[Sequence[Any]], samples: int
) -> Comparison:
    """Compares module and program on the first `samples` steps of `streams`."""
    return compare_layers(quantized, program, [Stream(steps) for steps in streams], samples=samples)


def _reference_graph(
    model: torch.nn.Module | None,
    quantized: QuantizedModel | GraphModule,
    quantizer: Int8Quantizer | None,
    inputs: Sequence[Any],
) -> GraphModule:
    """Returns the float graph that was annotated, from `quantize()`'s result or from a new export of `model`."""
    if isinstance(quantized, QuantizedModel) and quantized.reference is not None:
        if model is not None:
            _check_is_the_same(as_module(model), quantized.parameters)
        return quantized.reference
    if model is None:
        raise ModelError("analyze() needs a QuantizedModel from quantize(), or the float model that was exported.")
    module = as_module(model)
    check_eval(module, "analyze")
    converted = quantized.module if isinstance(quantized, QuantizedModel) else quantized
    exported = export(module, arguments_of(converted, inputs)).module()
    annotating = quantizer or Int8Quantizer(_target(quantized, quantizer))
    equalized = was_equalized(quantized.module if isinstance(quantized, QuantizedModel) else quantized)
    graph = annotating.prepare_graph(exported, equalizes=annotating.equalize if equalized is None else equalized)
    widen_as_converted(graph, converted)
    give_biases_as_converted(graph, converted)
    scale_rows_as_converted(graph, converted)
    scale_as_converted(graph, converted)
    return graph


def _check_is_the_same(model: torch.nn.Module, quantized: frozenset[str]) -> None:
    """Raises `ModelError` if the parameters of `model` differ from those that were quantized.

    torch.export leaves out parameters that are not read, so one of the two may have more parameters.
    """
    given = digests(model.parameters())
    if given and quantized and not (given <= quantized or quantized <= given):
        raise ModelError(
            f"This model is not the one that was quantized: {len(given - quantized)} of its {len(given)} parameters "
            "have other values. Give the model as it was then, or None, because the result of quantize() contains the "
            "float graph."
        )


def _target(quantized: QuantizedModel | GraphModule, quantizer: Int8Quantizer | None) -> str:
    if isinstance(quantized, QuantizedModel):
        return quantized.target
    return (quantizer or Int8Quantizer()).target.name


class _Steps:
    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.count = progress, total, 0

    def advance(self) -> None:
        self.count += 1
        if self.progress is not None:
            self.progress(self.count, self.total)


@torch.no_grad()
def _gather_statistics(
    found: QuantizedLayers, statistics: Sequence[Statistics], inputs: Sequence[tuple[torch.Tensor, ...]], steps: _Steps
) -> list[list[Noise]]:
    """Runs both graphs on all samples and updates the statistics of each layer.

    Returns three lists with the noise of each output: with everything quantized, with only weights and biases
    quantized, and with only activations quantized.
    """
    outputs: list[list[Noise]] = []
    constants, roundings = found.float_constants, found.roundings
    for sample in inputs:
        wanted, given = record(found.reference, sample), record(found.module, sample)
        for one in statistics:
            layer = one.layer
            if wanted[layer.reference_node].shape != given[layer.quantize].shape:
                raise ModelError(
                    f"A layer has shape {tuple(given[layer.quantize].shape)} in the quantized module and "
                    f"{tuple(wanted[layer.reference_node].shape)} in the float graph, so they belong to different "
                    f"models. Give the float model that was quantized.",
                    node=layer.operator.name,
                )
            codes = given[layer.quantize]
            value = _dequantized(codes, layer)
            one.add(wanted[layer.reference_node], layer.in_float(found.module, given), codes, value)
        alone = (record(found.module, sample, skipped=roundings), record(found.module, sample, known=constants))
        for one in statistics:
            weights, activations = (run[one.layer.quantize] for run in alone)
            one.add_apart(wanted[one.layer.reference_node], weights, _dequantized(activations, one.layer))
        signals = _outputs_of(found.reference, wanted)
        outputs = outputs or [[Noise() for _ in signals] for _ in range(3)]
        for sums, values in zip(outputs, (given, *alone), strict=True):
            for noise, signal, output in zip(sums, signals, _outputs_of(found.module, values), strict=True):
                noise.add(signal, output)
        steps.advance()
    return outputs


def _dequantized(codes: torch.Tensor, layer: QuantizedLayer) -> torch.Tensor:
    return (codes.float() - layer.qparams.zero_point) * layer.qparams.scale


def _outputs_of(module: GraphModule, values: Mapping[Node, Any]) -> list[torch.Tensor]:
    found = float_outputs(values[output_node(module.graph)])
    if not found:
        raise ModelError(
            "The model returns no float tensor, so its outputs have no error to analyze. Return a float tensor from "
            "forward."
        )
    return found


def _advice(
    treated: Sequence[LayerAccuracy],
    found: QuantizedLayers,
    rows: dict[QuantizedLayer, LayerAccuracy],
    samples: Sequence[tuple[torch.Tensor, ...]],
    *,
    learned_rounding: bool,
) -> tuple[Advice, ...]:
    """Returns advice for the layers to treat. Measures how much of the error per-channel weight scales remove."""
    layer_of = {row.node: layer for layer, row in rows.items()}
    tried = [row.node for row in treated if row.can_be_per_channel]
    treatments: list[tuple[QuantizedLayer, Treatment]] = [(layer_of[node], weight_per_channel) for node in tried]
    shares = dict(zip(tried, shares_of(found, treatments, samples), strict=True)) if tried else {}
    names = _names_of_wide_inputs(found)
    cases = [rules.TreatedLayer(row, shares.get(row.node), learned_rounding, names.get(row.node)) for row in treated]
    findings = [rules.finding_of(case) for case in cases]
    return tuple(
        Advice(
            node=one.layer.node,
            module=one.layer.module,
            why=one.why,
            what=one.what,
            code=rules.code_of(one, list(rows.values())),
            error_reduction=one.error_reduction,
        )
        for one in findings
    )


def _names_of_wide_inputs(found: QuantizedLayers) -> dict[str, str]:
    """Returns the names of the inputs that may be two int8 tensors, by the names of their nodes. Linear in nodes."""
    names = layers_of_inputs(found.reference)
    return {node.name: name for node in placeholders(found.module.graph) if (name := str(node.target)) in names}


def _layer_accuracy(position: int, one: Statistics, share: float | None) -> LayerAccuracy:
    layer, weight, qparams = one.layer, one.layer.weight, one.layer.qparams
    modules = modules_of(layer.operator)
    spec = OPERATORS.get(layer.op)
    is_fixed = len(layer.chain) == 1 and spec is not None and isinstance(spec.output_rule(layer.chain[0]), QParams)
    histogram = one.histogram or Histogram.over(qparams.low, qparams.high)
    return LayerAccuracy(
        node=layer.operator.name,
        op=layer.op,
        activation=op_name(layer.chain[1]) if len(layer.chain) > 1 else None,
        module=modules[-1][0] if modules else None,
        source=source_of(layer.operator),
        position=position,
        sqnr_db=one.output.sqnr_db,
        own_sqnr_db=one.own.sqnr_db,
        error_share=share,
        float_range=(one.low, one.high),
        int8_range=(qparams.low, qparams.high),
        fixed_range=is_fixed,
        saturation=one.clipped / max(1, one.values),
        channels=one.channels,
        dead_channels=one.dead_channels,
        lost_channels=one.lost_channels,
        weight_range=None if weight is None else (float(weight.values.min()), float(weight.values.max())),
        weight_scales=None if weight is None else (float(weight.scales.min()), float(weight.scales.max())),
        weight_channels=None if weight is None else len(weight.codes),
        weak_channels=None if weight is None else weak_channels(weight),
        can_be_per_channel=weight is not None and weight.takes_per_channel and weight.scales.numel() == 1,
        histogram=_bins(histogram),
        largest_codes=() if weight is None else tuple(largest_codes(weight).tolist()),
        weights_sqnr_db=one.weights.sqnr_db,
        activations_sqnr_db=one.activations.sqnr_db,
    )


def _bins(histogram: Histogram) -> Bins:
    counts = (tuple(map(int, one.tolist())) for one in (histogram.reference, histogram.quantized))
    return Bins(histogram.low, histogram.high, *counts)


def _worst_first(row: LayerAccuracy) -> tuple[bool, float, float]:
    return row.error_share is None, -(row.error_share or 0.0), row.sqnr_db

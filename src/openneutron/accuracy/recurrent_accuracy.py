"""Measures how many dB of SQNR recurrent layers lose, and how many dB their options gain."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from openneutron.accuracy.quantized_layers import QuantizedLayer, QuantizedLayers
from openneutron.accuracy.recurrent_layers import RecurrentLayer
from openneutron.accuracy.replay import record
from openneutron.accuracy.shares import add_noise_of_ends, noise_ratio, rounded_per_channel
from openneutron.accuracy.statistics import Noise, Statistics
from openneutron.ops.recurrent import WIDE_CELL_LIMIT, is_cell_state
from openneutron.quantizer.cell_states import is_scaled_cell
from openneutron.quantizer.layer_options import has_wide_state
from openneutron.results.layerwise_accuracy import Gain, RecurrentAccuracy

__all__ = ["measure_recurrent_layers", "runs_of"]

CODES = 255  # int8 codes of a half of a wide state


@dataclass(frozen=True)
class _Change:
    """A change of the quantized network: values that are not rounded or rounded differently, and replaced constants."""

    rounded: Mapping[Node, Callable[[Any], Any]] = field(default_factory=dict)
    known: Mapping[Node, Tensor] = field(default_factory=dict)


def measure_recurrent_layers(
    found: QuantizedLayers,
    layers: Sequence[RecurrentLayer],
    statistics: Mapping[QuantizedLayer, Statistics],
    samples: Sequence[tuple[Tensor, ...]],
    done: Callable[[], None],
    *,
    learned_rounding: bool,
) -> tuple[RecurrentAccuracy, ...]:
    """Returns the accuracy of `layers`, the layer with the largest share of the error first.

    Runs the network once for each change of a layer and each sample. `done` is called after each run.
    `learned_rounding` says whether learned rounding has been applied to the weights already.
    """
    if not layers:
        return ()
    parts, options = [_parts(found, layer) for layer in layers], _options_by_modules(found, layers)
    changes = [_Change(), *(one for each in (*parts, *options.values()) for one in each.values())]
    errors = dict(zip(map(id, changes), _errors(found, changes, samples, done), strict=True))
    error = errors[id(changes[0])]
    counts, numbers = Counter(layer.modules for layer in layers), Counter[tuple[str, ...]]()
    rows = []
    for layer, each in zip(layers, parts, strict=True):
        numbers[layer.modules] += 1
        gains = {name: _decibels(error, errors[id(change)]) for name, change in each.items()}
        option_decibels = {name: _decibels(error, errors[id(one)]) for name, one in options[layer.modules].items()}
        rows.append(
            RecurrentAccuracy(
                modules=layer.modules,
                number=numbers[layer.modules] if counts[layer.modules] > 1 else None,
                steps=len(layer.ends_of_steps),
                error_share=(error - errors[id(each["float"])]) / error if error else None,
                gain_db=gains["float"],
                states_gain_db=gains["states"],
                gates_gain_db=gains["gates"],
                weights_gain_db=gains["weights"],
                step_sqnr_db=tuple(statistics[one].output.sqnr_db for one in layer.ends_of_steps),
                nodes=tuple(one.operator.name for one in layer.layers),
                gains=_gains(layer, option_decibels, learned_rounding=learned_rounding),
            )
        )
    return tuple(sorted(rows, key=lambda row: -(row.error_share or 0.0)))


def runs_of(found: QuantizedLayers, layers: Sequence[RecurrentLayer]) -> int:
    """Returns the number of runs of the network that `measure_recurrent_layers` needs for each sample."""
    if not layers:
        return 0
    changes = (*(_parts(found, layer) for layer in layers), *_options_by_modules(found, layers).values())
    return 1 + sum(map(len, changes))


def _decibels(before: float, after: float) -> float:
    if before == after:
        return 0.0
    return math.inf if after == 0.0 else 10 * math.log10(before / after)


def _parts(found: QuantizedLayers, layer: RecurrentLayer) -> dict[str, _Change]:
    """Returns the changes that leave a layer, or a part of it, in float."""
    weights = _float_constants([layer])
    return {
        "float": _Change(_unrounded(found, layer.layers), weights),
        "states": _Change(_unrounded(found, layer.states)),
        "gates": _Change(_unrounded(found, layer.gates)),
        "weights": _Change(known=weights),
    }


def _options_by_modules(
    found: QuantizedLayers, layers: Sequence[RecurrentLayer]
) -> dict[tuple[str, ...], dict[str, _Change]]:
    """Returns the changes that options make. An option applies to all recurrent layers of a module."""
    by_modules: dict[tuple[str, ...], list[RecurrentLayer]] = {}
    for layer in layers:
        by_modules.setdefault(layer.modules, []).append(layer)
    return {modules: _options(found, each) for modules, each in by_modules.items()}


def _options(found: QuantizedLayers, layers: Sequence[RecurrentLayer]) -> dict[str, _Change]:
    weights, every = _float_constants(layers), [one for layer in layers for one in layer.layers]
    changes = {"float": _Change(_unrounded(found, every), weights), "weights": _Change(known=weights)}
    rounded = {}
    for one in every:
        if one.weight is not None and one.weight.takes_per_channel and one.weight.scales.numel() == 1:
            rounded[one.weight.node] = rounded_per_channel(one.weight).movedim(0, one.weight.axis)
    if rounded:
        changes["per channel"] = _Change(known=rounded)
    cells = [one for layer in layers for one in layer.states if _is_narrow_cell_state(one)]
    if cells:
        changes["wide"] = _Change({**_unrounded(found, cells), **{one.quantize: _in_two_tensors for one in cells}})
    return changes


def _float_constants(layers: Iterable[RecurrentLayer]) -> dict[Node, Tensor]:
    return {node: value for layer in layers for one in layer.layers for node, value in one.constants.items()}


def _is_narrow_cell_state(layer: QuantizedLayer) -> bool:
    node = layer.reference_node
    return is_cell_state(node) and has_wide_state(node) and not is_scaled_cell(node)


def _unrounded(found: QuantizedLayers, layers: Iterable[QuantizedLayer]) -> dict[Node, Callable[[Any], Any]]:
    return dict.fromkeys(found.roundings_of(layers), _unchanged)


def _unchanged(value: Any) -> Any:
    return value


def _in_two_tensors(value: Tensor) -> Tensor:
    """Rounds a cell state as `wide` does: the state limited to -1..1, and the excess."""
    fine = value.clamp(-1, 1)
    limit = WIDE_CELL_LIMIT - 1
    excess = (value - fine).clamp(-limit, limit)
    step, coarse = 2 / CODES, 2 * limit / CODES
    return torch.round(fine / step) * step + torch.round(excess / coarse) * coarse


def _errors(
    found: QuantizedLayers, changes: Sequence[_Change], samples: Sequence[tuple[Tensor, ...]], done: Callable[[], None]
) -> list[float]:
    """Returns the noise-to-signal ratio of the outputs with each change."""
    sums: list[list[Noise]] = [[] for _ in changes]
    for sample in samples:
        wanted = record(found.reference, sample)
        for change, noise in zip(changes, sums, strict=True):
            values = record(found.module, sample, known=change.known, replaced=change.rounded)
            add_noise_of_ends(noise, found, wanted, values.__getitem__)
            done()
    return [noise_ratio(noise) for noise in sums]


def _gains(layer: RecurrentLayer, gains: Mapping[str, float], *, learned_rounding: bool) -> tuple[Gain, ...]:
    """Returns the options for a layer, the largest gain first, and training, whose gain is not measured, last."""
    keys = ", ".join(f'"{module}"' for module in layer.modules)
    rows = []
    if "wide" in gains:
        rows.append(Gain(f"wide=[{keys}]", gains["wide"], "simulated: cell states in two int8 tensors"))
    if "per channel" in gains:
        settings = ", ".join(f'"{module}": "per_channel"' for module in layer.modules)
        rows.append(Gain(f"layers={{{settings}}}", gains["per channel"], "measured, with weights rounded to nearest"))
    if not learned_rounding:
        rows.append(Gain('recover="auto"', gains["weights"], "limit: weights and biases in float"))
    rows.sort(key=lambda row: -(row.gain_db or 0.0))
    return (*rows, Gain("prepare_training(quantized)", gains["float"], "limit: the layer in float"))

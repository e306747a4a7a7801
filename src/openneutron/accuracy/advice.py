"""Selects the layers to treat, and a remedy for each: the first rule of `RULES` that applies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median_low

from openneutron.accuracy.quantized_layers import INPUT, REQUANTIZE
from openneutron.core.numbers import in_percent
from openneutron.page.verdict import LOW_SQNR_DB
from openneutron.results.layerwise_accuracy import LayerAccuracy, RecurrentAccuracy

__all__ = [
    "FLOAT",
    "HEALTHY_DB",
    "OBSERVER",
    "PER_CHANNEL",
    "RECOVER",
    "WIDE_INPUT",
    "AdviceRule",
    "Finding",
    "OutputSqnr",
    "TreatedLayer",
    "code_of",
    "finding_of",
    "layers_to_treat",
    "verdict",
]  # fmt: skip

# At 20 dB, the amplitude of the noise is a tenth of the output's. Among the labelled networks in benchmarks.fidelity,
# those above 20 dB (25 dB to 32 dB) lose at most 0.6 points of accuracy, and the one below (8 dB) loses 6 points.
HEALTHY_DB = LOW_SQNR_DB
# Smallest share of the final error for which a single layer is treated.
SMALLEST_SHARE = 0.1
# Weak or lost channels matter above this share of the channels; saturated values matter above this share of the values.
MANY_CHANNELS = 0.1
MUCH_SATURATION = 0.005
# If float values exceed the int8 range by more than this share of the range, clipping them costs more accuracy than a
# wider range would.
FAR_BEYOND = 0.1
# Per-channel weight scales are advised instead of float if they remove at least this share of the error that float
# removes.
ENOUGH = 0.5
MOST_LAYERS = 2

# Smallest gain for which an option is advised for a recurrent layer.
SMALLEST_GAIN_DB = 0.5

OR_ROUND = '; or use learned rounding for its weights (recover="auto")'
PER_CHANNEL, FLOAT, OBSERVER, RECOVER, INPUT_RANGE = "per channel", "float", "observer", "recovery", "input"
WIDE_INPUT = "wide input"


@dataclass(frozen=True)
class OutputSqnr:
    """SQNR of the outputs in dB: of the quantized model, and with only weights or only activations quantized."""

    output_db: float
    weights_db: float
    activations_db: float

    def __str__(self) -> str:
        return (
            f"The SQNR of the outputs is {self.output_db:z.1f} dB ({self.weights_db:z.1f} with only weights in int8, "
            f"{self.activations_db:z.1f} with only activations in int8)."
        )


@dataclass(frozen=True)
class TreatedLayer:
    """A layer to treat, and the effect of per-channel weight scales."""

    layer: LayerAccuracy
    per_channel: float | None
    """Share of the error that per-channel weight scales remove; None for a layer that does not support them."""
    learned_rounding: bool = False
    """Whether learned rounding has been applied to the weights already."""
    wide_name: str | None = None
    """The name for the option `wide`, if the layer is an input of the model that can be two int8 tensors; else None."""


@dataclass(frozen=True)
class AdviceRule:
    """A remedy, the condition under which it applies, and the texts for the user."""

    remedy: str
    applies: Callable[[TreatedLayer], bool]
    why: str
    """The reason. May contain fields of `LayerAccuracy` and `median_code`, the median of `largest_codes`, in braces."""
    what: str
    """The remedy in words. `{or_round}` is replaced by a text that suggests learned rounding, unless it was applied."""


@dataclass(frozen=True)
class Finding:
    """A layer to treat and the rule that applies to it."""

    case: TreatedLayer
    rule: AdviceRule

    @property
    def layer(self) -> LayerAccuracy:
        """The layer to treat."""
        return self.case.layer

    @property
    def why(self) -> str:
        """The rule's reason, with the layer's numbers."""
        codes = self.layer.largest_codes
        texts = {"median_code": median_low(codes) if codes else 0, "saturated": in_percent(self.layer.saturation, 1)}
        return self.rule.why.format_map({**vars(self.layer), **texts})

    @property
    def what(self) -> str:
        """The remedy in words."""
        return self.rule.what.format(or_round="" if self.case.learned_rounding else OR_ROUND)

    @property
    def error_reduction(self) -> float | None:
        """The share of the error that the remedy removes; None if the remedy was not tried."""
        tried = {PER_CHANNEL: self.case.per_channel, **dict.fromkeys((FLOAT, WIDE_INPUT), self.layer.error_share)}
        return tried.get(self.rule.remedy)


def _per_channel_helps(case: TreatedLayer) -> bool:
    return case.per_channel is not None and case.per_channel >= ENOUGH * (case.layer.error_share or 0.0)


def _has_many_weak_channels(case: TreatedLayer) -> bool:
    return (case.layer.weak_channels or 0) > MANY_CHANNELS * (case.layer.weight_channels or 0)


def _is_clipped(layer: LayerAccuracy) -> bool:
    (low, high), (lowest, highest) = layer.int8_range, layer.float_range
    return layer.saturation > MUCH_SATURATION and max(low - lowest, highest - high) > FAR_BEYOND * (high - low)


def _has_lost_channels(case: TreatedLayer) -> bool:
    return case.layer.lost_channels > MANY_CHANNELS * case.layer.channels


RULES = (
    AdviceRule(
        WIDE_INPUT,
        lambda case: case.wide_name is not None and not _is_clipped(case.layer),
        "Rounding the model's input to int8 loses the accuracy: a step is 1/255 of {int8_range[0]:.4g} to "
        "{int8_range[1]:.4g}.",
        "Write the input as two int8 tensors (an option of quantize()), or take its logarithm before the model.",
    ),
    AdviceRule(
        INPUT_RANGE,
        lambda case: case.layer.op == INPUT,
        "Quantizing the model's input loses the accuracy: its 256 codes cover {int8_range[0]:.4g} to "
        "{int8_range[1]:.4g}.",
        "Scale the inputs (normalize them or take a logarithm), or calibrate with inputs of the relevant range.",
    ),
    AdviceRule(
        OBSERVER,
        lambda case: _is_clipped(case.layer) and not case.layer.fixed_range,
        "{saturated} of its values are outside of the int8 range ({int8_range[0]:.4g} to {int8_range[1]:.4g}; "
        "the float range is {float_range[0]:.4g} to {float_range[1]:.4g}).",
        "Take ranges from the extremes (observer=RangeObserver), and calibrate with inputs like these.",
    ),
    AdviceRule(
        PER_CHANNEL,
        _per_channel_helps,
        "Its weight has one scale for {weight_channels} channels, and the largest code of half of them is at most "
        "{median_code} of 127.",
        "Use a scale for each channel of this weight.",
    ),
    AdviceRule(
        FLOAT,
        _has_many_weak_channels,
        "{weak_channels} of the {weight_channels} channels of its weight use fewer than 8 of 255 codes, and scales "
        "per channel do not help.",
        "Keep it in float, on the CPU{or_round}.",
    ),
    AdviceRule(
        RECOVER,
        lambda case: _has_lost_channels(case) or case.layer.op == REQUANTIZE,
        "{lost_channels} of the {channels} channels of its output have a single code in int8, because other channels "
        "cover {float_range[0]:.4g} to {float_range[1]:.4g}.",
        "Use recovery, which equalizes the ranges of channels.",
    ),
    AdviceRule(
        FLOAT,
        lambda _: True,
        "Its own rounding reduces the SQNR to {own_sqnr_db:.1f} dB, over a range of {float_range[0]:.4g} to "
        "{float_range[1]:.4g}.",
        "Keep it in float, on the CPU{or_round}.",
    ),
)
"""The rules in order of precedence. Rules about calibration come first, as other remedies only hide a wrong range."""


def layers_to_treat(layers: Sequence[LayerAccuracy], kept: OutputSqnr) -> tuple[LayerAccuracy, ...]:
    """Returns at most two layers to treat, the worst first. `layers` must have the order of `Analysis.layers`.

    Returns none if the SQNR of the outputs is at least `HEALTHY_DB`, or if no single layer causes at least
    `SMALLEST_SHARE` of the error.
    """
    if kept.output_db >= HEALTHY_DB:
        return ()
    return tuple(layer for layer in layers if (layer.error_share or 0.0) >= SMALLEST_SHARE)[:MOST_LAYERS]


def finding_of(case: TreatedLayer) -> Finding:
    """Returns the layer with the first rule that applies to it."""
    return Finding(case, next(rule for rule in RULES if rule.applies(case)))


def verdict(
    treated: Sequence[LayerAccuracy],
    kept: OutputSqnr,
    recurrent: Sequence[RecurrentAccuracy] = (),
    *,
    learned_rounding: bool = False,
) -> str:
    """Returns a few sentences about the SQNR of the outputs and the layers to treat.

    `recurrent` are the recurrent layers, the one with the largest share of the error first. `learned_rounding` says
    whether learned rounding has been applied to the weights already.
    """
    if kept.output_db >= HEALTHY_DB:
        return f"{kept} No layer needs treatment."
    loop = next((one for one in recurrent if (one.error_share or 0.0) >= SMALLEST_SHARE), None)
    if loop is not None and not (treated and (treated[0].error_share or 0.0) > (loop.error_share or 0.0)):
        return f"{kept} {_about(loop)}"
    if treated:
        names = (f"'{layer.node}'" + (f" ({layer.module})" if layer.module else "") for layer in treated)
        return f"{kept} Treat {' and '.join(names)} first."
    recover = "" if learned_rounding else 'recover="auto", '
    if kept.weights_db < kept.activations_db:
        cause = f'Weights cause most of it: treat all layers ({recover}weight_granularity="per_channel", '
    else:
        cause = f"Activations cause most of it, and other weights would gain little: treat all layers ({recover}"
        cause += 'recover="best", which tries other ranges, '
    return (
        f"{kept} No measured layer causes {in_percent(SMALLEST_SHARE)} of the error by itself. {cause}"
        "quantization-aware training)."
    )


def _about(loop: RecurrentAccuracy) -> str:
    """Returns two sentences about the recurrent layer with the largest share of the error."""
    parts = {"states": loop.states_gain_db, "gates": loop.gates_gain_db, "weights": loop.weights_gain_db}
    costs = ", ".join(f"{name} {gain:+.1f} dB" for name, gain in sorted(parts.items(), key=lambda part: -part[1]))
    best = next((gain for gain in loop.gains if (gain.gain_db or 0.0) >= SMALLEST_GAIN_DB), loop.gains[-1])
    gain = "" if best.gain_db is None else f" ({best.gain_db:+.1f} dB; {best.how})"
    return (
        f"The {loop.steps} steps of the recurrent layer {loop.name} cause {in_percent(loop.error_share or 0.0)} of the "
        f"error: in float, the SQNR changes by {loop.gain_db:+.1f} dB ({costs}). Try {best.code} first{gain}."
    )


def code_of(finding: Finding, layers: Sequence[LayerAccuracy]) -> str:
    """Returns the option of `quantize()` that applies the remedy of a finding, as Python code."""
    if finding.rule.remedy in (PER_CHANNEL, FLOAT):
        setting = "per_channel" if finding.rule.remedy == PER_CHANNEL else "float"
        return f'layers={{"{key_of(finding.layer, layers)}": "{setting}"}}'
    if finding.rule.remedy == WIDE_INPUT:
        return f'wide=["{finding.case.wide_name}"]'
    return {OBSERVER: "observer=RangeObserver", RECOVER: 'recover="fast"', INPUT_RANGE: ""}[finding.rule.remedy]


def key_of(layer: LayerAccuracy, layers: Sequence[LayerAccuracy]) -> str:
    """Returns the key of the option `layers` for `layer`.

    The key is the name of its module if the module contains no other layer, else the name of its operator.
    """
    inside = [one for one in layers if one.module is not None and _is_in(one.module, layer.module or "")]
    return layer.module if layer.module and len(inside) == 1 else layer.op


def _is_in(module: str, outer: str) -> bool:
    return module == outer or module.startswith(f"{outer}.")

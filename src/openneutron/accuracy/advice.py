"""Which layers to treat, and how: rules as data, the first one that applies to a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median_low

from openneutron.accuracy.layers import INPUT, REQUANTIZE
from openneutron.accuracy.result import LayerAccuracy

__all__ = [
    "FLOAT", "HEALTHY_DB", "OBSERVER", "PER_CHANNEL", "RECOVER", "Case", "Finding", "Kept", "Rule",
    "code_of", "finding_of", "to_treat", "verdict",
]  # fmt: skip

# Noise of a tenth of the output's size. The labelled networks of benchmarks.fidelity that keep more (25 dB to 32 dB)
# lose at most 0.6 points of accuracy; the one that keeps less (8 dB) loses 6.
HEALTHY_DB = 20.0
# What one layer must cause to be treated alone.
SMALLEST_SHARE = 0.1
# Of the channels of a weight or an output, or of values: what is no exception any more.
MANY_CHANNELS = 0.1
MUCH_SATURATION = 0.005
# Of the range of int8: what is clipped there loses more than one that is wider would cost all others.
FAR_BEYOND = 0.1
# The part of what float removes that scales for each channel must remove, too.
ENOUGH = 0.5
MOST_LAYERS = 2

OR_MEND = '; or round its weights by what they do (recover="auto")'
PER_CHANNEL, FLOAT, OBSERVER, RECOVER, INPUT_RANGE = "per channel", "float", "observer", "recovery", "input"


@dataclass(frozen=True)
class Kept:
    """The SQNR of the outputs in dB: as they are, with weights and biases alone quantized, with activations alone."""

    output_db: float
    weights_db: float
    activations_db: float

    def __str__(self) -> str:
        return (
            f"The outputs keep {self.output_db:.1f} dB ({self.weights_db:.1f} with weights alone in int8, "
            f"{self.activations_db:.1f} with activations alone)."
        )


@dataclass(frozen=True)
class Case:
    """A layer to treat, and what was tried."""

    layer: LayerAccuracy
    per_channel: float | None
    """The share of the error that one scale for each channel of its weight removes; None where it cannot have them."""
    is_mended: bool = False
    """Whether its weights are rounded by what they do already."""


@dataclass(frozen=True)
class Rule:
    """A remedy, when it is the one to try, and why."""

    remedy: str
    applies: Callable[[Case], bool]
    why: str
    """The reason, with names of fields of `LayerAccuracy` to fill in, and `median_code` of its `largest_codes`."""
    what: str
    """What to try, with `or_mend` where rounding the weights anew may do, if that has not been done."""


@dataclass(frozen=True)
class Finding:
    """A layer to treat and the rule that applies to it."""

    case: Case
    rule: Rule

    @property
    def layer(self) -> LayerAccuracy:
        """The layer."""
        return self.case.layer

    @property
    def why(self) -> str:
        """The rule's reason with the layer's numbers."""
        codes = self.layer.largest_codes
        return self.rule.why.format_map({**vars(self.layer), "median_code": median_low(codes) if codes else 0})

    @property
    def what(self) -> str:
        """What to try."""
        return self.rule.what.format(or_mend="" if self.case.is_mended else OR_MEND)

    @property
    def removes(self) -> float | None:
        """The share of the error that the remedy removes, where it was tried."""
        tried = {PER_CHANNEL: self.case.per_channel, FLOAT: self.layer.error_share}
        return tried.get(self.rule.remedy)


def _per_channel_helps(case: Case) -> bool:
    return case.per_channel is not None and case.per_channel >= ENOUGH * (case.layer.error_share or 0.0)


def _is_weak(case: Case) -> bool:
    return (case.layer.weak_channels or 0) > MANY_CHANNELS * (case.layer.weight_channels or 0)


def _is_clipped(layer: LayerAccuracy) -> bool:
    (low, high), (lowest, highest) = layer.int8_range, layer.float_range
    return layer.saturation > MUCH_SATURATION and max(low - lowest, highest - high) > FAR_BEYOND * (high - low)


def _has_lost_channels(case: Case) -> bool:
    return case.layer.lost_channels > MANY_CHANNELS * case.layer.channels


RULES = (
    Rule(
        INPUT_RANGE,
        lambda case: case.layer.op == INPUT,
        "The input itself loses it: its 256 codes reach from {int8_range[0]:.4g} to {int8_range[1]:.4g}.",
        "Give inputs of another scale (normalize, take a logarithm), or calibrate with the range that matters.",
    ),
    Rule(
        OBSERVER,
        lambda case: _is_clipped(case.layer) and not case.layer.fixed_range,
        "{saturation:.1%} of its values are outside of what int8 reaches ({int8_range[0]:.4g} to {int8_range[1]:.4g}; "
        "float has {float_range[0]:.4g} to {float_range[1]:.4g}).",
        "Take ranges from the extremes (no other observer than RangeObserver), and calibrate with inputs like these.",
    ),
    Rule(
        PER_CHANNEL,
        _per_channel_helps,
        "One scale serves all {weight_channels} channels of its weight, and half of them reach at most code "
        "{median_code} of 127.",
        "One scale for each channel of this weight.",
    ),
    Rule(
        FLOAT,
        _is_weak,
        "{weak_channels} of the {weight_channels} channels of its weight have fewer than 8 of 255 codes, and scales "
        "for each channel do not help.",
        "Leave it in float, on the CPU{or_mend}.",
    ),
    Rule(
        RECOVER,
        lambda case: _has_lost_channels(case) or case.layer.op == REQUANTIZE,
        "Of {lost_channels} of the {channels} channels of its output int8 leaves one code, as others reach from "
        "{float_range[0]:.4g} to {float_range[1]:.4g}.",
        "Recover what it lost: equalization evens channels out.",
    ),
    Rule(
        FLOAT,
        lambda _: True,
        "Its own rounding leaves {own_sqnr_db:.1f} dB, over a range of {float_range[0]:.4g} to {float_range[1]:.4g}.",
        "Leave it in float, on the CPU{or_mend}.",
    ),
)
"""Tried in this order. What calibration got wrong comes first: other remedies would only hide it."""


def to_treat(layers: Sequence[LayerAccuracy], kept: Kept) -> tuple[LayerAccuracy, ...]:
    """The layers to treat, at most two, the worst first. `layers` are sorted as those of an `Analysis`.

    None where the outputs are good, or no layer causes much of the error by itself.
    """
    if kept.output_db >= HEALTHY_DB:
        return ()
    return tuple(layer for layer in layers if (layer.error_share or 0.0) >= SMALLEST_SHARE)[:MOST_LAYERS]


def finding_of(case: Case) -> Finding:
    """The layer with the first rule that applies."""
    return Finding(case, next(rule for rule in RULES if rule.applies(case)))


def verdict(treated: Sequence[LayerAccuracy], kept: Kept, *, is_mended: bool = False) -> str:
    """In a sentence or two, how good the outputs are, and whether anything is to be treated.

    `is_mended` says that weights are rounded by what they do already.
    """
    if kept.output_db >= HEALTHY_DB:
        return f"{kept} Nothing to treat."
    if treated:
        names = (f"'{layer.node}'" + (f" ({layer.module})" if layer.module else "") for layer in treated)
        return f"{kept} Treat {' and '.join(names)} first."
    recover = "" if is_mended else 'recover="auto", '
    if kept.weights_db < kept.activations_db:
        cause = f'Weights cause most of it: treat them all ({recover}weight_granularity="per_channel", '
    else:
        cause = f"Activations cause most of it, so that other weights would win little: treat them all ({recover}"
        cause += 'recover="best", which tries other ranges, '
    return (
        f"{kept} No layer that was measured causes {SMALLEST_SHARE:.0%} of the error alone. {cause}"
        "quantization-aware training)."
    )


def code_of(finding: Finding, layers: Sequence[LayerAccuracy]) -> str:
    """The option that carries out a finding, to paste."""
    if finding.rule.remedy in (PER_CHANNEL, FLOAT):
        setting = "per_channel" if finding.rule.remedy == PER_CHANNEL else "float"
        return f'layers={{"{key_of(finding.layer, layers)}": "{setting}"}}'
    return {OBSERVER: "observer=RangeObserver", RECOVER: 'recover="fast"', INPUT_RANGE: ""}[finding.rule.remedy]


def key_of(layer: LayerAccuracy, layers: Sequence[LayerAccuracy]) -> str:
    """The key of `layers` that means `layer`: its module where that holds no other layer, else its operator."""
    inside = [one for one in layers if one.module is not None and _is_in(one.module, layer.module or "")]
    return layer.module if layer.module and len(inside) == 1 else layer.op


def _is_in(module: str, outer: str) -> bool:
    return module == outer or module.startswith(f"{outer}.")

"""Methods that recover accuracy lost to per-tensor int8, on the exported float graph and on the converted module."""

from __future__ import annotations

import warnings

from openneutron.passes.equalize import equalize
from openneutron.recovery.absorb_biases import absorb_biases
from openneutron.recovery.channel_ranges import Ranges, channel_ranges
from openneutron.recovery.correct_biases import correct_biases
from openneutron.recovery.gptq_rounding import gptq_codes, round_weights_by_gptq
from openneutron.recovery.recipes import RECIPES, Recipe, give_biases, recover_converted, recover_exported
from openneutron.recovery.search import Trial
from openneutron.recovery.zero_inactive_channels import zero_inactive_channels

__all__ = [
    "RECIPES", "Ranges", "Recipe", "Trial", "absorb_biases", "channel_ranges", "correct_biases", "equalize",
    "give_biases", "gptq_codes", "recover_converted", "recover_exported", "round_weights_by_gptq",
    "zero_inactive_channels",
]  # fmt: skip

_DEPRECATED = {
    "round_weights": "round_weights_by_gptq",
    "rounded_with_feedback": "gptq_codes",
    "silence_channels": "zero_inactive_channels",
}


def __getattr__(name: str) -> object:
    if name not in _DEPRECATED:
        raise AttributeError(f"module 'openneutron.recovery' has no attribute '{name}'")
    new = _DEPRECATED[name]
    warnings.warn(f"openneutron.recovery.{name} is now called {new}.", DeprecationWarning, stacklevel=2)
    return globals()[new]

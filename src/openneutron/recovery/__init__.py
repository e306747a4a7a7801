"""What per-tensor int8 loses, and how to get it back: functions over the exported float graph and the converted one."""

from openneutron.passes.equalize import equalize
from openneutron.recovery.absorb_biases import absorb_biases
from openneutron.recovery.channel_ranges import Ranges, channel_ranges
from openneutron.recovery.correct_biases import correct_biases
from openneutron.recovery.recipes import RECIPES, Recipe, give_biases, recover_converted, recover_exported
from openneutron.recovery.round_weights import round_weights, rounded_with_feedback
from openneutron.recovery.search import Trial
from openneutron.recovery.silence import silence_channels

__all__ = [
    "RECIPES", "Ranges", "Recipe", "Trial", "absorb_biases", "channel_ranges", "correct_biases", "equalize",
    "give_biases", "recover_converted", "recover_exported", "round_weights", "rounded_with_feedback",
    "silence_channels",
]  # fmt: skip

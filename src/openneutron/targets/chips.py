"""Lists the chips: the targets of the vendor's converter, with the properties of their NPUs.

chips.toml has the numbers. They are published by NXP or were read from files that NXP's converter wrote. An unknown
property is `None` and is displayed as "unknown".
"""

from __future__ import annotations

import enum
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openneutron.targets.board import Board
from openneutron.targets.costs import Costs

__all__ = ["ASSUMED_MACS_PER_PIPELINE", "TARGETS", "HardwareVersion", "NeutronTarget"]


class HardwareVersion(enum.IntEnum):
    """Compute block generation, numbered as in the vendor's SDK."""

    N1 = 1
    N3 = 2


# Assumed where the MACs per pipeline are unknown. Limits become stricter as this number grows, so the largest
# plausible value is safe.
ASSUMED_MACS_PER_PIPELINE = 16


@dataclass(frozen=True)
class NeutronTarget:
    """One target of the vendor's converter, or a board with it. `None` means unknown.

    A board replaces the clock, the memory and the costs.
    """

    name: str
    """The converter's name of the target, or the name of the board."""
    soc: str
    """NXP's name of the chip."""
    npu: str | None
    """NXP's name of the NPU."""
    neutron_class: str
    """NXP's class of the NPU."""
    hardware_version: HardwareVersion | None = None
    """Generation of the NPU's hardware: 1 for N1, 2 for N3."""
    macs_per_cycle: int | None = None
    """Multiply-accumulates per cycle of the whole array."""
    pipelines: int | None = None
    """Number of pipelines."""
    macs_per_pipeline: int | None = None
    """Multiply-accumulates per cycle of one pipeline."""
    clock_hz: int | None = None
    """Clock of the NPU."""
    sram_bytes: int | None = None
    """SRAM of the target."""
    flash_bytes: int | None = None
    """Flash of the target."""
    fused_activations: frozenset[str] = frozenset({"RELU", "RELU6", "RELU_N1_TO_1"})
    """TFLite's names of the activations that a layer may include."""
    source: str = ""
    """The documents that state the numbers."""
    costs: Costs = field(default_factory=Costs)
    """Coefficients of the estimated cycles."""
    board: Board | None = None
    """The board; None for a chip alone."""

    @property
    def label(self) -> str:
        """The name of the board, if there is one, else that of the target."""
        return self.name if self.board is None else self.board.name

    @property
    def channel_granularity(self) -> int:
        """Number of channels that a pipeline processes at once (M in the operator limits)."""
        return self.macs_per_pipeline or ASSUMED_MACS_PER_PIPELINE

    @property
    def granularity_note(self) -> str:
        """A sentence that gives the MACs per pipeline, for messages about operator limits."""
        if self.macs_per_pipeline:
            return f"A pipeline of {self.name} has {self.macs_per_pipeline} MACs."
        assumed = ASSUMED_MACS_PER_PIPELINE
        return f"The MACs per pipeline of {self.name} are unknown; the limits assume {assumed}."

    def align_channels(self, size: int) -> int:
        """Rounds `size` up to a multiple of the MACs per pipeline."""
        return -(-size // self.channel_granularity) * self.channel_granularity


def _chip(values: Mapping[str, Any]) -> NeutronTarget:
    version = values.get("hardware_version")
    return NeutronTarget(**{
        "npu": None, **values, "hardware_version": None if version is None else HardwareVersion[version],
    })  # fmt: skip


def _read_chips() -> dict[str, NeutronTarget]:
    text = Path(__file__).with_name("chips.toml").read_text(encoding="utf-8")
    return {chip["name"]: _chip(chip) for chip in tomllib.loads(text)["chips"]}


TARGETS: dict[str, NeutronTarget] = _read_chips()

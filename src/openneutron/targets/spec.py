"""`NeutronTargetSpec`: a target that a user named, as a chip, a board or a board file."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import replace

from openneutron.errors import TargetError
from openneutron.targets.board import Board
from openneutron.targets.chips import TARGETS, HardwareVersion, NeutronTarget
from openneutron.targets.files import boards, is_board_file, read_board

__all__ = ["NeutronTargetSpec", "Target"]


def _hint(target: str) -> str:
    """Returns a hint about an unknown target: a similar name, or how to give its converter flavour."""
    letters = _letters(target)
    flavor = re.search(r"SDK[_-]?\d.*|\d+\.\d+.*", target, re.IGNORECASE)
    if flavor is not None:
        name = next((name for name in TARGETS if name in letters), "imxrt700")
        return f" '{flavor[0]}' is a converter flavour: give '{name}', and neutron_converter_flavor='{flavor[0]}'."
    known = {_letters(name): target.name for target in TARGETS.values() for name in (target.name, target.soc)}
    known |= {_letters(name): one.name for one in boards().values() for name in (one.name, one.title)}
    near = difflib.get_close_matches(letters, known, n=1)
    return f" Did you mean '{known[near[0]]}'?" if near else ""


def _letters(text: str) -> str:
    """Returns the letters and digits of `text` in lower case."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _target_of(board: Board) -> NeutronTarget:
    """Returns the chip of a board, with the board's clock, memory and costs."""
    chip = TARGETS[board.chip]
    return replace(
        chip,
        clock_hz=board.clocks.npu_hz or chip.clock_hz,
        sram_bytes=board.sram_bytes if board.regions else chip.sram_bytes,
        flash_bytes=board.flash_bytes if board.regions else chip.flash_bytes,
        costs=board.costs,
        board=board,
    )


def _find(target: object) -> NeutronTarget:
    if isinstance(target, NeutronTarget):
        return target
    if isinstance(target, Board):
        return _target_of(target)
    if isinstance(target, (str, os.PathLike)) and is_board_file(target):
        return _target_of(read_board(target))
    if isinstance(target, str) and target in TARGETS:
        return TARGETS[target]
    if isinstance(target, str) and target in boards():
        return _target_of(boards()[target])
    raise TargetError(
        f"Unknown target '{target}'.{_hint(str(target))} Known targets: {', '.join(TARGETS)}. Known boards: "
        f"{', '.join(boards())}. A board file ends in .toml."
    )


_NOT_SHOWN = ("source", "costs", "board")


class NeutronTargetSpec:
    """The properties of one target. Its methods have the names of ExecuTorch's own backend.

    `target` is the name of a chip ("imxrt700") or of a board ("mimxrt700_evk"), the path of a board file
    ("board.toml"), or another specification. Raises `TargetError` for an unknown target (the message lists the known
    ones) and for a wrong board file, and `InputError` for a board file that cannot be read.
    """

    def __init__(self, target: Target = "imxrt700") -> None:
        self.neutron_target: NeutronTarget = (
            target.neutron_target if isinstance(target, NeutronTargetSpec) else _find(target)
        )

    def __repr__(self) -> str:
        shown = {name: value for name, value in vars(self.neutron_target).items() if name not in _NOT_SHOWN}
        known = (f"{name}={'unknown' if value is None else value}" for name, value in shown.items())
        board = "" if self.board is None else f"board={self.board.name}, "
        return f"NeutronTargetSpec({board}{', '.join(known)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NeutronTargetSpec) and self.neutron_target == other.neutron_target

    def __hash__(self) -> int:
        return hash(self.neutron_target)

    @property
    def name(self) -> str:
        """The converter's name of the target."""
        return self.neutron_target.name

    def get_name(self) -> str:
        """The converter's name of the target."""
        return self.neutron_target.name

    @property
    def board(self) -> Board | None:
        """The board; None for a chip alone."""
        return self.neutron_target.board

    @property
    def chip(self) -> NeutronTargetSpec:
        """The chip without its board. The compiler uses only the chip."""
        return NeutronTargetSpec(self.name)

    @property
    def known_name(self) -> str:
        """The name of the board, if OpenNeutron has its file; else that of the chip."""
        return self.board.name if self.board is not None and boards().get(self.board.name) == self.board else self.name

    def is_subsystem(self) -> bool:
        """Whether the NPU has a controller of its own (Neutron-S)."""
        return self.neutron_target.neutron_class == "Neutron-S"

    def get_num_pipes(self) -> int | None:
        """Number of compute pipelines; None if unknown."""
        return self.neutron_target.pipelines

    def get_num_macs(self) -> int | None:
        """Multiply-accumulates of one pipeline per cycle; None if unknown."""
        return self.neutron_target.macs_per_pipeline

    def get_hw_version(self) -> HardwareVersion | None:
        """Generation of the compute block; None if unknown."""
        return self.neutron_target.hardware_version


Target = str | os.PathLike[str] | Board | NeutronTarget | NeutronTargetSpec
"""The types that functions accept as a target."""

"""Places the parts of a program in the memory regions of a board, and computes what would make it fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from openneutron.core.messages import listed
from openneutron.targets import Board, Region

__all__ = [
    "BoardFit",
    "PlacedPart",
    "ProgramPart",
    "RegionUse",
    "Remedy",
    "assign_regions",
    "fit_on_board",
    "remedy_of",
    "with_remedies",
]  # fmt: skip

FETCH = "fetch_constants_to_sram=True"
MOST_COMBINATIONS = 1 << 16
"""The most combinations of regions that are tried: those of five parts and nine regions."""


@dataclass(frozen=True)
class ProgramPart:
    """A part of a program that is placed in one region. `role` is one of `openneutron.targets.ROLES`."""

    role: str
    what: str
    bytes: int
    npu_reads: bool
    """Whether the NPU reads the part. Then its region must be readable for the NPU."""


@dataclass(frozen=True)
class PlacedPart:
    """A part, and the region in which it is placed."""

    role: str
    """A key of the board's `placement`."""
    what: str
    """The part in words."""
    bytes: int
    """Its size."""
    region: str | None
    """Name of the region; None if no region has room for it."""
    missing_bytes: int = 0
    """Bytes that are missing in the region with the most free bytes."""


@dataclass(frozen=True)
class RegionUse:
    """The use of a region. `None` means unknown."""

    name: str
    """Name of the region."""
    kind: str
    """Kind of the memory, such as "SRAM" or "flash"."""
    free_bytes: int | None
    """Bytes that the firmware itself does not need."""
    used_bytes: int
    """Bytes that the program needs there."""

    @property
    def left_bytes(self) -> int | None:
        """Bytes that are still free."""
        return None if self.free_bytes is None else self.free_bytes - self.used_bytes


@dataclass(frozen=True)
class Remedy:
    """A change of the program, and the memory that the changed program needs."""

    change: str
    """An option, or a description of the change."""
    ram_bytes: int
    """The bytes that the changed program needs in writable regions."""
    fits: bool | None
    """Whether the changed program fits; None if it lies in a region of unknown size."""
    how: str = "computed"
    """"computed" from the program, or "tried" with the model."""


@dataclass(frozen=True)
class BoardFit:
    """The verdict on a program on a board."""

    board: str
    """Name of the board."""
    verdict: str
    """"fits", "fits with fetch_constants_to_sram", "does not fit", or "unknown" if the size of a region is unknown."""
    parts: tuple[PlacedPart, ...]
    """The parts of the program, and where they are placed."""
    regions: tuple[RegionUse, ...]
    """The regions of the board, and their use."""
    remedies: tuple[Remedy, ...] = ()
    """If the program does not fit: changes of it. Those with which it fits are first, then unknown ones."""
    notes: tuple[str, ...] = ()
    """Sentences about the placement, such as numbers that are unknown."""

    @property
    def ram_bytes(self) -> int:
        """Bytes of all parts in writable regions, plus those of the parts that do not fit."""
        flash = {use.name for use in self.regions if use.kind == "flash"}
        return sum(part.bytes for part in self.parts if part.region not in flash)

    @property
    def without_room(self) -> tuple[PlacedPart, ...]:
        """The parts that no region has room for."""
        return tuple(part for part in self.parts if part.region is None)

    @property
    def missing_bytes(self) -> int:
        """Bytes that are missing; 0 if all parts fit."""
        return sum(part.missing_bytes for part in self.parts)


def assign_regions(parts: Sequence[ProgramPart], board: Board) -> BoardFit:
    """Places each part in one region, and prefers the regions that `board.may_hold` lists first.

    A region of unknown size has room for all parts; the verdict is then "unknown". Places the parts one by one in the
    order of `parts`. If they do not all fit in this way, tries all combinations of regions, if there are at most
    `MOST_COMBINATIONS`.
    """
    choices = [_regions_for(part, board) for part in parts]
    placed = _place_in_turn(parts, choices)
    if any(one.region is None for one in placed) and math.prod(map(len, choices)) <= MOST_COMBINATIONS:
        placed = _first_combination(parts, choices) or placed
    used: dict[str, int] = {}
    for part in placed:
        if part.region is not None:
            used[part.region] = used.get(part.region, 0) + part.bytes
    regions = tuple(RegionUse(one.name, one.kind, one.free_bytes, used.get(one.name, 0)) for one in board.regions)
    unknown = any(use.free_bytes is None and use.used_bytes for use in regions)
    fits = all(one.region is not None for one in placed)
    verdict = "does not fit" if not fits else "unknown" if unknown else "fits"
    return BoardFit(board.name, verdict, tuple(placed), regions, notes=tuple(_notes(parts, placed, board)))


def _regions_for(part: ProgramPart, board: Board) -> list[Region]:
    return [one for one in board.may_hold(part.role) if not (part.npu_reads and one.npu_reads is False)]


def _first_combination(parts: Sequence[ProgramPart], choices: Sequence[Sequence[Region]]) -> list[PlacedPart] | None:
    chosen = next((found for found in itertools.product(*choices) if _have_room(parts, found)), None)
    if chosen is None:
        return None
    return [PlacedPart(part.role, part.what, part.bytes, one.name) for part, one in zip(parts, chosen, strict=True)]


def _have_room(parts: Sequence[ProgramPart], regions: Sequence[Region]) -> bool:
    used: dict[Region, int] = {}
    for part, region in zip(parts, regions, strict=True):
        used[region] = used.get(region, 0) + part.bytes
    return all(region.free_bytes is None or size <= region.free_bytes for region, size in used.items())


def _place_in_turn(parts: Sequence[ProgramPart], choices: Sequence[Sequence[Region]]) -> list[PlacedPart]:
    left: dict[str, int] = {}
    placed: list[PlacedPart] = []
    for part, regions in zip(parts, choices, strict=True):
        room = {one.name: left.get(one.name, one.free_bytes) for one in regions}
        name = next((name for name, size in room.items() if size is None or size >= part.bytes), None)
        if name is None:
            missing = part.bytes - max((size or 0 for size in room.values()), default=0)
            placed.append(PlacedPart(part.role, part.what, part.bytes, None, missing))
            continue
        if (size := room[name]) is not None:
            left[name] = size - part.bytes
        placed.append(PlacedPart(part.role, part.what, part.bytes, name))
    return placed


def _notes(parts: Sequence[ProgramPart], placed: Sequence[PlacedPart], board: Board) -> Iterator[str]:
    names = {one.name: one for one in board.regions}
    for part, where in zip(parts, placed, strict=True):
        if where.region is not None and part.npu_reads and names[where.region].npu_reads is None:
            yield f"It is unknown whether the NPU reads the region '{where.region}', which holds the {part.what}."
    for part in parts:
        if not _regions_for(part, board):
            yield f"No region that the NPU reads may hold the {part.what}."
    used = {where.region for where in placed}
    # Linux manages DDR itself, and has far more of it than a program needs.
    shared = [one.name for one in board.regions if one.name in used and one.is_writable and one.kind != "DDR"]
    if unreserved := [name for name in shared if not names[name].reserved_bytes]:
        yield (
            f"The firmware's own memory is not counted in {listed(unreserved)}, because reserved_bytes is 0: write the "
            "bytes of its data, stack and heap, and of code in this memory, as reserved_bytes to a board file "
            "(`openneutron targets show BOARD -o board.toml`). The map file of a firmware without the model has them."
        )


def fit_on_board(parts: Sequence[ProgramPart], board: Board, changes: Mapping[str, Sequence[ProgramPart]]) -> BoardFit:
    """Returns the verdict on the parts of a program. If they do not fit, tries each of `changes`.

    `changes` maps the text of each change to the parts of the changed program.
    """
    found = assign_regions(parts, board)
    if found.verdict != "does not fit":
        return found
    return with_remedies(
        found, [remedy_of(change, assign_regions(changed, board)) for change, changed in changes.items()]
    )


def with_remedies(found: BoardFit, remedies: Sequence[Remedy]) -> BoardFit:
    """Returns a verdict with these remedies. Fitting with `fetch_constants_to_sram` is a verdict of its own."""
    if found.verdict in ("fits", "unknown"):
        return found
    fetches = any(remedy.change == FETCH and remedy.fits for remedy in remedies)
    return replace(
        found,
        verdict="fits with fetch_constants_to_sram" if fetches else "does not fit",
        remedies=tuple(sorted(remedies, key=lambda one: (True, None, False).index(one.fits))),
    )


def remedy_of(change: str, found: BoardFit, how: str = "computed") -> Remedy:
    """Returns the remedy of a change, from the verdict on the changed program."""
    return Remedy(change, found.ram_bytes, None if found.verdict == "unknown" else found.verdict == "fits", how)


def without(parts: Iterable[ProgramPart], role: str, saved: int) -> tuple[ProgramPart, ...]:
    """Returns the parts, with `saved` bytes less for `role`."""
    return tuple(replace(part, bytes=max(0, part.bytes - saved)) if part.role == role else part for part in parts)

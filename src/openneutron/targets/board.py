"""Describes a board: its memory regions, the placement of a program in them, and its clocks."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from openneutron.targets.costs import Costs

__all__ = ["KINDS", "ROLES", "Board", "Clocks", "Placement", "Region"]

KINDS = ("SRAM", "TCM", "PSRAM", "DDR", "flash")
"""The kinds of memory. All but flash can be written."""


@dataclass(frozen=True)
class Region:
    """A region of memory. `None` means unknown."""

    name: str
    """Name of the region."""
    kind: str
    """Kind of the memory: "SRAM", "TCM", "PSRAM", "DDR" or "flash"."""
    bytes: int | None = None
    """Its size."""
    start: int | None = None
    """The address of its first byte, as the processor that runs ExecuTorch sees it."""
    npu_reads: bool | None = None
    """Whether the NPU can read it. Data that the NPU reads must be in such a region."""
    reserved_bytes: int = 0
    """Bytes that the firmware itself needs there, such as code, stack and heap."""
    source: str = ""
    """The document that the numbers are from."""

    @property
    def free_bytes(self) -> int | None:
        """Bytes that are left for a program; None if the size is unknown."""
        return None if self.bytes is None else max(0, self.bytes - self.reserved_bytes)

    @property
    def is_writable(self) -> bool:
        """Whether a program can write to it."""
        return self.kind != "flash"


@dataclass(frozen=True)
class Placement:
    """The names of the regions that may hold each part of a program, the preferred one first."""

    program: tuple[str, ...] = ()
    """The regions for the bytes of the `.pte`, with microcode and weights."""
    planned: tuple[str, ...] = ()
    """The regions for the planned buffers: activations and most inputs and outputs."""
    method: tuple[str, ...] = ()
    """The regions for the pool of the method allocator."""
    temporary: tuple[str, ...] = ()
    """The regions for the pool of the temporary allocator, which contains the NPU's scratch."""
    io: tuple[str, ...] = ()
    """The regions for inputs and outputs that are not planned; the application allocates them."""
    source: str = ""
    """The document that states the placement."""

    def regions_of(self, role: str) -> tuple[str, ...]:
        """Returns the names of the regions that may hold `role`, one of `ROLES`."""
        return tuple(getattr(self, role))


ROLES = tuple(one.name for one in fields(Placement) if one.name != "source")
"""The parts of a program that are placed."""


@dataclass(frozen=True)
class Clocks:
    """Clocks in Hz. `None` means unknown."""

    npu_hz: int | None = None
    """Clock of the NPU."""
    cpu_hz: int | None = None
    """Clock of the processor that runs ExecuTorch."""
    source: str = ""
    """The document that the numbers are from."""


@dataclass(frozen=True)
class Board:
    """A board with one of the chips of `TARGETS`."""

    name: str
    """Name of the board, as Zephyr names it, or of its file."""
    chip: str
    """The converter's name of the target."""
    title: str = ""
    """The name under which the board is sold."""
    regions: tuple[Region, ...] = ()
    """The regions of memory."""
    placement: Placement = Placement()
    """The regions that may hold each part of a program."""
    clocks: Clocks = Clocks()
    """The clocks."""
    costs: Costs = field(default_factory=Costs)
    """Coefficients of the estimated cycles."""

    def region(self, name: str) -> Region:
        """Returns the region of this name."""
        return next(one for one in self.regions if one.name == name)

    def may_hold(self, role: str) -> tuple[Region, ...]:
        """Returns the regions that may hold `role`, one of `ROLES`, the preferred one first.

        If `placement` has none, returns all writable regions; for the program, flash follows.
        """
        if names := self.placement.regions_of(role):
            return tuple(map(self.region, names))
        writable = tuple(one for one in self.regions if one.is_writable)
        return writable if role != "program" else (*writable, *(one for one in self.regions if not one.is_writable))

    @property
    def sram_bytes(self) -> int | None:
        """The free bytes of all writable regions that a role may use; None if one is unknown or there are none."""
        found = dict.fromkeys(one for role in ROLES for one in self.may_hold(role) if one.is_writable)
        return _sum(tuple(found))

    @property
    def flash_bytes(self) -> int | None:
        """The free bytes of all flash that may hold the program; None if a size is unknown, or without flash."""
        return _sum(tuple(one for one in self.may_hold("program") if not one.is_writable))


def _sum(regions: tuple[Region, ...]) -> int | None:
    sizes = [one.free_bytes for one in regions]
    known = [size for size in sizes if size is not None]
    return sum(known) if sizes and len(known) == len(sizes) else None

"""The verb that shows targets: chips, boards and board files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openneutron.cli.paths import board_file_name
from openneutron.cli.terminal import Terminal
from openneutron.cli.verbs import add_verb

if TYPE_CHECKING:
    from openneutron.cli.fitting_table import FittingTable
    from openneutron.targets import Board, NeutronTarget

__all__ = ["add_verbs"]

UNKNOWN = "unknown"


def add_verbs() -> None:
    """Adds the verb of this module to the command line."""
    add_verb(targets)


def targets(
    terminal: Terminal,
    action: Annotated[
        str | None, typer.Argument(metavar="show", help="show: print all that is known of a target.")
    ] = None,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A chip, a board, or a board file (.toml).")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", callback=board_file_name, help="With show: write a board file (.toml) to edit."
        ),
    ] = None,
) -> None:
    """List the chips, the boards, and the vendor's converters that are installed; or show one target."""
    from openneutron.errors import OptionError

    if action is None and output is None:
        _list(terminal)
        return
    if action != "show" or name is None:
        raise OptionError("Give `openneutron targets`, or `openneutron targets show NAME`.")
    _show(terminal, name, output)


def _list(terminal: Terminal) -> None:
    from rich.console import Group

    from openneutron.cli.fitting_table import FittingTable
    from openneutron.targets import TARGETS, boards
    from openneutron.vendor import sdk

    table = FittingTable("target", "SoC", "NPU", "class", "MACs/cycle", "clock MHz", "SRAM bytes", "flash bytes")
    for target in TARGETS.values():
        clock = None if target.clock_hz is None else target.clock_hz // 1_000_000
        cells = (target.npu, target.neutron_class, target.macs_per_cycle, clock, target.sram_bytes, target.flash_bytes)
        table.add_row(target.name, target.soc, *map(_cell, cells))
    sold = FittingTable("board", "sold as", "target", "memory")
    for board in boards().values():
        memory = ", ".join(f"{one.name} {_size(one.bytes)}" for one in board.regions)
        sold.add_row(board.name, board.title, board.chip, memory)
    found = list(map(str, sdk.installed()))
    data = {
        "targets": [_plain(target) for target in TARGETS.values()],
        "boards": [asdict(board) for board in boards().values()],
        "converters": found,
    }
    terminal.show(Group(table, sold), data)
    if not terminal.json:
        terminal.out.print("Converters installed: " + (", ".join(found) or "none; programs stay portable"))


def _plain(target: NeutronTarget) -> dict[str, Any]:
    return {**asdict(target), "fused_activations": sorted(target.fused_activations)}


def _cell(value: object) -> str:
    return UNKNOWN if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _size(size: int | None) -> str:
    """Returns a number of bytes in the largest unit that divides it."""
    if size is None:
        return UNKNOWN
    units = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
    exact = (f"{size / unit:g} {name}" for name, unit in units if size >= unit and 100 * size % unit == 0)
    return next(exact, f"{size:,} bytes")


def _show(terminal: Terminal, name: str, output: Path | None) -> None:
    from openneutron.core.files import write_file
    from openneutron.core.messages import as_argument
    from openneutron.targets import Board, NeutronTargetSpec, text_of_board

    target = NeutronTargetSpec(name).neutron_target
    if output is not None:
        board = target.board or Board(f"{target.name}_board", target.name)
        write_file(output, text_of_board(board).encode())
        text = f"{output}: edit it, then give it as --target {as_argument(output)}"
        terminal.show(text, {"file": str(output)})
        return
    from rich.console import Group

    from openneutron.ir.cost import array_of

    assumptions = list(array_of(target).assumptions)
    terminal.show(Group(*_blocks(target)), {**_plain(target), "assumptions": assumptions})


def _blocks(target: NeutronTarget) -> list[Any]:
    from rich.text import Text

    from openneutron.ir.cost import array_of

    clock = UNKNOWN if target.clock_hz is None else f"{target.clock_hz / 1e6:g} MHz"
    assumed = array_of(target).assumptions
    lines = [
        f"{target.label}: {target.soc} ({target.name})",
        f"  NPU {_cell(target.npu)}, {target.neutron_class}, {_cell(target.macs_per_cycle)} MACs per cycle, {clock}"
        + (f"; assumed: {', '.join(assumed)}" if assumed else ""),
        *([f"  source: {target.source}"] if target.source else []),
    ]
    board = target.board
    if board is None:
        sram, flash = _size(target.sram_bytes), _size(target.flash_bytes)
        return [Text("\n".join([*lines, f"  SRAM {sram}, flash {flash}"]))]
    if board.clocks.cpu_hz is not None:
        lines.append(f"  CPU {board.clocks.cpu_hz / 1e6:g} MHz")
    if board.clocks.source:
        lines.append(f"  source of the clocks: {board.clocks.source}")
    costs = board.costs
    lines.append(
        f"  costs: {costs.operator_cycles:g} cycles per operator, {costs.bytes_per_cycle:g} bytes per cycle"
        + "".join(f", {kind} x {factor:g}" for kind, factor in costs.compute)
        + (f" ({costs.source})" if costs.source else "")
    )
    sources = [f"  {one.name}: {one.source or UNKNOWN}" for one in board.regions]
    sources.append(f"  what may lie where: {board.placement.source or UNKNOWN}")
    return [Text("\n".join(lines)), _region_table(board), Text("\n".join(["Sources:", *sources]))]


def _region_table(board: Board) -> FittingTable:
    from openneutron.cli.fitting_table import FittingTable
    from openneutron.targets import ROLES

    table = FittingTable("region", "kind", "size", "reserved", "address", "NPU reads", "may hold")
    for one in board.regions:
        held = [role for role in ROLES if one in board.may_hold(role)]
        table.add_row(
            one.name,
            one.kind,
            _size(one.bytes),
            _size(one.reserved_bytes) if one.reserved_bytes else "",
            UNKNOWN if one.start is None else f"{one.start:#010x}",
            UNKNOWN if one.npu_reads is None else "yes" if one.npu_reads else "no",
            ", ".join(held),
        )
    return table

"""Reads and writes board files, including those of the boards in the package.

A board file is TOML. docs/howto/board-file.md describes it for users.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import Any

from openneutron.core.files import read_file
from openneutron.core.messages import did_you_mean
from openneutron.core.toml_values import parsed_toml
from openneutron.errors import OptionError, TargetError
from openneutron.targets.board import KINDS, ROLES, Board, Clocks, Placement, Region
from openneutron.targets.chips import TARGETS
from openneutron.targets.costs import COMPUTE_KINDS, Costs
from openneutron.targets.table import TomlTable

__all__ = ["boards", "is_board_file", "read_board", "text_of_board"]

SUFFIX = ".toml"
_KEYS = ("name", "title", "based_on", "regions", "placement", "clocks", "costs")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
_LARGEST_SIZE, _LARGEST_CLOCK = 2**48, 10**11


def is_board_file(target: object) -> bool:
    """Whether `target` is the path of a board file: a path object, or a text that ends in .toml."""
    return isinstance(target, os.PathLike) or (isinstance(target, str) and target.lower().endswith(SUFFIX))


def check_board_name(path: Path) -> None:
    """Raises `OptionError` if the path of a file to write does not end in .toml, as board files do."""
    if not is_board_file(path.name):
        raise OptionError(f"'{path}' is not the name of a board file. Give a name that ends in .toml.")


@functools.cache
def boards() -> Mapping[str, Board]:
    """Returns the boards whose files are in the package, by name."""
    files = sorted((Path(__file__).parent / "boards").glob(f"*{SUFFIX}"))
    return MappingProxyType({file.stem: read_board(file) for file in files})


def read_board(file: str | os.PathLike[str]) -> Board:
    """Reads a board file.

    Raises `InputError` if the file cannot be read, and `TargetError`, which names the file and the key, for a file that
    is not TOML, an unknown key, a wrong value, two regions with the same name or with common addresses, a placement in
    an unknown region, and a `based_on` that is neither a chip nor a board.
    """
    return _read(Path(file), ())


def _read(path: Path, readers: tuple[Path, ...]) -> Board:
    """Reads a board file. `readers` are the files whose `based_on` led to it."""
    content = read_file(path)
    try:
        table = TomlTable(str(path), "", parsed_toml(content))
    except ValueError as error:
        raise TargetError(f"'{path}' is not valid TOML: {error}.") from error
    if path.resolve() in readers:
        raise table.file_error("the file is based on itself, by its key 'based_on'.")
    table.check_keys(_KEYS)
    base = _base(table, path, (*readers, path.resolve()))
    name = table.text("name", path.stem)
    if not _NAME.fullmatch(name):
        raise table.file_error(f"'name' takes letters, digits, '_', '.' and '-', with a letter first, not {name!r}.")
    if name in TARGETS:
        raise table.file_error(f"'name' is '{name}', the name of a chip. Give the board another name.")
    regions = _merged(base.regions, _regions(table))
    _check_addresses(table, regions)
    return Board(
        name=name,
        chip=base.chip,
        title=table.text("title", base.title),
        regions=regions,
        placement=_placement(table.table("placement"), base.placement, regions),
        clocks=_clocks(table.table("clocks"), base.clocks),
        costs=_costs(table.table("costs"), base.costs),
    )


def _base(table: TomlTable, path: Path, readers: tuple[Path, ...]) -> Board:
    """Returns the board that the file extends: a chip without regions, a board of OpenNeutron, or another file."""
    based_on = table.required_text("based_on")
    if is_board_file(based_on):
        return _read(path.parent / based_on, readers)
    if based_on in TARGETS:
        return Board(based_on, based_on)
    folder = Path(__file__).parent / "boards"
    if (known := folder / f"{based_on}{SUFFIX}").is_file():
        return _read(known, readers)
    names = [*TARGETS, *(file.stem for file in sorted(folder.glob(f"*{SUFFIX}")))]
    raise table.file_error(
        f"'based_on' names a chip, a board or a board file (.toml), not '{based_on}'.{did_you_mean(based_on, names)} "
        f"Known: {', '.join(names)}."
    )


def _regions(table: TomlTable) -> tuple[Region, ...]:
    found: dict[str, Region] = {}
    for one in table.tables("regions"):
        one.check_keys([field.name for field in fields(Region)])
        region = _region(one)
        if region.name in found:
            raise one.file_error(f"there are two regions '{region.name}'. Give each region its own name.")
        found[region.name] = region
    return tuple(found.values())


def _region(table: TomlTable) -> Region:
    size = table.integer("bytes", 1, _LARGEST_SIZE)
    reserved = table.integer("reserved_bytes", 0, _LARGEST_SIZE) or 0
    if size is not None and reserved > size:
        raise table.file_error(f"'reserved_bytes' is {reserved}, but the region has {size} bytes.")
    return Region(
        name=table.required_text("name"),
        kind=table.required_text("kind", KINDS),
        bytes=size,
        start=table.integer("start", 0, _LARGEST_SIZE),
        npu_reads=table.truth("npu_reads"),
        reserved_bytes=reserved,
        source=table.text("source"),
    )


def _check_addresses(table: TomlTable, regions: Iterable[Region]) -> None:
    """Raises `TargetError` for two regions with a common address."""
    spans = [(one.start, one.start + one.bytes, one) for one in regions if one.start is not None and one.bytes]
    for (low, high, first), (start, end, second) in combinations(spans, 2):
        if start < high and low < end:
            raise table.file_error(
                f"the regions '{first.name}' and '{second.name}' overlap at address {max(low, start):#x}. "
                "Check 'start' and 'bytes'."
            )


def _merged(base: Iterable[Region], own: Iterable[Region]) -> tuple[Region, ...]:
    """Returns the regions of both. A region of `own` replaces the region of `base` with the same name."""
    return tuple({**{one.name: one for one in base}, **{one.name: one for one in own}}.values())


def _placement(table: TomlTable, base: Placement, regions: tuple[Region, ...]) -> Placement:
    table.check_keys((*ROLES, "source"))
    known = {one.name: one for one in regions}
    given = {role: names for role in ROLES if (names := table.texts(role)) is not None}
    for role, names in given.items():
        for name in names:
            if name not in known:
                raise table.file_error(
                    f"'{role}' names the region '{name}', which the board does not have.{did_you_mean(name, known)}"
                )
            if role != "program" and not known[name].is_writable:
                raise table.file_error(
                    f"'{role}' must lie in memory that can be written, but the region '{name}' is flash."
                )
    return replace(base, **given, source=table.text("source", base.source))


def _clocks(table: TomlTable, base: Clocks) -> Clocks:
    table.check_keys([field.name for field in fields(Clocks)])
    npu, cpu = (table.integer(key, 1, _LARGEST_CLOCK) for key in ("npu_hz", "cpu_hz"))
    return Clocks(npu or base.npu_hz, cpu or base.cpu_hz, table.text("source", base.source))


def _costs(table: TomlTable, base: Costs) -> Costs:
    table.check_keys([field.name for field in fields(Costs)])
    compute = table.table("compute")
    compute.check_keys(COMPUTE_KINDS)
    factors = {**dict(base.compute), **{kind: compute.number(kind, 1.0) for kind in compute.values}}
    return Costs(
        operator_cycles=table.number("operator_cycles", base.operator_cycles, may_be_zero=True),
        bytes_per_cycle=table.number("bytes_per_cycle", base.bytes_per_cycle),
        cpu_cycles_per_element=table.number("cpu_cycles_per_element", base.cpu_cycles_per_element, may_be_zero=True),
        cpu_cycles_per_mac=table.number("cpu_cycles_per_mac", base.cpu_cycles_per_mac, may_be_zero=True),
        compute=tuple(sorted(factors.items())),
        source=table.text("source", base.source),
    )


def text_of_board(board: Board) -> str:
    """Returns the text of a board file from which `read_board` returns an equal board."""
    import tomlkit

    document = tomlkit.document()
    document.update({"name": board.name, "title": board.title, "based_on": board.chip})
    if board.regions:
        array = tomlkit.aot()
        for region in board.regions:
            array.append(tomlkit.item(dict(_given(region))))
        document["regions"] = array
    for name, part in (("placement", board.placement), ("clocks", board.clocks), ("costs", board.costs)):
        if values := dict(_given(part)):
            document[name] = values
    return str(document.as_string())


def _given(part: Any) -> Iterator[tuple[str, Any]]:
    """Returns the values of a dataclass that differ from the defaults, as types of TOML."""
    for one in fields(part):
        value = getattr(part, one.name)
        if value != one.default and value is not None:
            yield one.name, dict(value) if one.name == "compute" else list(value) if isinstance(value, tuple) else value

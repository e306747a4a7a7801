"""Compares the imports of the package with the order of rooms in docs/architecture.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "openneutron"
PACKAGE = "openneutron"
Imports = Mapping[str, frozenset[str]]


def rooms_of(document: str) -> dict[str, int]:
    """Returns the row of each room in the table, by the room's name."""
    table = document.split("| room | contents |", 1)[1].split("\n\n", 1)[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {name: number for number, row in enumerate(rows) for name in re.findall(r"`(\w+)(?:/|\.py)`", row)}


def name_of(file: Path, sources: Path = SOURCES) -> str:
    parts = file.relative_to(sources.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_by(tree: ast.Module, known: frozenset[str]) -> Iterator[str]:
    """Returns each module in `known` that the code imports, also in functions and for type checkers only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (found for name in names if (found := name if name in known else node.module or "") in known)


@cache
def package_imports() -> Imports:
    files = [*SOURCES.rglob("*.py"), *SOURCES.rglob("*.pyi")]
    known = frozenset(map(name_of, files))
    return {name_of(file): frozenset(imported_by(ast.parse(file.read_text()), known)) for file in files}


def against_order(imports: Imports, rooms: Mapping[str, int]) -> list[str]:
    """Returns imports of a lower row, and modules without a room. The package itself is in no row
    and imports any room.
    """
    room = {name: name.split(".")[1] for name in imports if name != PACKAGE}
    unknown = [f"{name}: no room in docs/architecture.md" for name in room if room[name] not in rooms]
    wrong = [
        f"{name} imports {other}"
        for name, others in imports.items()
        for other in others
        if {name, other} <= room.keys() and rooms.get(room[name], 0) < rooms.get(room[other], 0)
    ]
    return sorted([*unknown, *wrong])


def cycle_in(imports: Imports) -> list[str]:
    """Returns the modules of one import cycle, in order; empty if there is none. Linear in imports."""
    done: set[str] = set()
    for start in imports:
        path: dict[str, Iterator[str]] = {start: iter(sorted(imports[start]))} if start not in done else {}
        while path:
            name = next(reversed(path))
            for other in path[name]:
                if other in path:
                    return [*list(path)[list(path).index(other) :], other]
                if other not in done:
                    path[other] = iter(sorted(imports.get(other, ())))
                    break
            else:
                del path[name]
                done.add(name)
    return []


def test_imports_follow_the_order_in_the_architecture_document() -> None:
    assert against_order(package_imports(), rooms_of((ROOT / "docs" / "architecture.md").read_text())) == []


def test_every_room_in_the_document_exists() -> None:
    rooms = rooms_of((ROOT / "docs" / "architecture.md").read_text())
    assert {name for name in rooms if not ((SOURCES / name).is_dir() or (SOURCES / f"{name}.py").is_file())} == set()


def test_imports_have_no_cycle() -> None:
    assert cycle_in(package_imports()) == []


@pytest.mark.parametrize(
    ("imports", "expected"),
    [
        (
            {"openneutron.ir.a": {"openneutron.ops.b"}, "openneutron.ops.b": set()},
            ["openneutron.ir.a imports openneutron.ops.b"],
        ),
        ({"openneutron.ops.b": {"openneutron.ir.a"}, "openneutron.ir.a": set()}, []),
        ({"openneutron.ir.a": {"openneutron.ir.b"}, "openneutron.ir.b": set()}, []),
        ({"openneutron": {"openneutron.ops.b"}, "openneutron.ops.b": {"openneutron"}}, []),
        ({"openneutron.attic.a": set()}, ["openneutron.attic.a: no room in docs/architecture.md"]),
    ],
)
def test_an_import_of_a_lower_row_is_found(imports: dict[str, set[str]], expected: list[str]) -> None:
    rooms = rooms_of("| room | contents |\n|---|---|\n| `ir/` | a |\n| `ops/`, `flow.py` | b |\n\n| `attic/` | c |")
    assert rooms == {"ir": 0, "ops": 1, "flow": 1}
    assert against_order({name: frozenset(others) for name, others in imports.items()}, rooms) == expected


@pytest.mark.parametrize(
    ("imports", "expected"),
    [
        ({"a": "b", "b": "c", "c": "b"}, ["b", "c", "b"]),
        ({"a": "bc", "b": "d", "c": "d", "d": ""}, []),
        ({"a": "a"}, ["a", "a"]),
        ({"a": "b", "b": "", "c": "d", "d": "c"}, ["c", "d", "c"]),
    ],
)
def test_a_cycle_is_found(imports: dict[str, str], expected: list[str]) -> None:
    assert cycle_in({name: frozenset(others) for name, others in imports.items()}) == expected


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import a.b", {"a.b"}),
        ("from a import b, c", {"a.b", "a"}),
        ("def f():\n    from a.b import name", {"a.b"}),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from a import b", {"a.b"}),
        ("import os", set()),
    ],
)
def test_imports_are_read(code: str, expected: set[str]) -> None:
    assert set(imported_by(ast.parse(code), frozenset({"a", "a.b"}))) == expected

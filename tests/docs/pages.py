"""Runs the code of a page of docs/ and compares what it prints with the output that the page shows.

- A block ```python is run. The blocks of a page share their names and one empty working folder.
- A block ```python title="FILE" is written to that file, and not run.
- A block ```console is run line by line as far as lines start with "$ "; the other lines are the expected output.
- The working folder has the folder `examples` of the repository.
- A block ```text directly after one of ```python is its expected output; with any title, it is an example that is not
  compared, because it depends on the processor.

In expected output, "..." stands for any text, and a line of it for any lines. Numbers with a decimal point may differ,
because they depend on the processor: by 10 %, or by 1.5 if that is more. Integers of four digits or more may differ by
5 %, and counts of samples (integers in a line with "%") by 3. Runs of blanks are equal, and borders of tables
are ignored.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PREAMBLE = """
import torch
from torch import nn
from openneutron import load, lower, quantize


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, 4)

    def forward(self, image):
        return self.head(self.pool(self.features(image)).flatten(1))


torch.manual_seed(0)
net, images = Net().eval(), torch.rand(48, 3, 32, 32)
"""
"""The code before that of each page in docs/howto/."""

__all__ = ["Block", "blocks_of", "difference", "run_page"]

_FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    title: str | None
    text: str
    line: int
    """The number of the line of the page on which `text` starts."""


def blocks_of(page: str) -> list[Block]:
    """Returns the fenced blocks of a page."""
    return [
        Block(found[1], found[2], found[3], page.count("\n", 0, found.start(3)) + 1) for found in _FENCE.finditer(page)
    ]


def run_page(page: Path, folder: Path) -> None:
    """Runs the code of a page in `folder`. Raises `AssertionError` if it prints something else than the page shows."""
    names: dict[str, Any] = {"__name__": "__page__"}
    blocks = blocks_of(page.read_text())
    (folder / "examples").symlink_to(Path(__file__).parents[2] / "examples")
    with contextlib.chdir(folder):
        sys.path.insert(0, str(folder))
        try:
            if page.parent.name == "howto":
                exec(PREAMBLE, names)
            for block, following in zip(blocks, [*blocks[1:], None], strict=True):
                for code, printed, expected in _results(block, following, page, names):
                    fault = difference(printed, expected)
                    assert fault is None, f"{page.name}, line {block.line}: {code}\n{fault}\nprinted:\n{printed}"
        finally:
            sys.path.remove(str(folder))


def _results(
    block: Block, following: Block | None, page: Path, names: dict[str, Any]
) -> Iterator[tuple[str, str, str]]:
    """Runs a block; yields pieces of its code with what they printed and with what the page shows."""
    if block.language == "python" and block.title is not None:
        Path(block.title).write_text(block.text)
    elif block.language == "python":
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, names)
        if following is None or following.language != "text":
            yield "", printed.getvalue(), ""
        elif following.title is None:
            yield "", printed.getvalue(), following.text
    elif block.language == "console":
        for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            command, _, shown = part.replace("\\\n", " ").partition("\n")
            yield command, _run(command), shown


def _run(command: str) -> str:
    words = shlex.split(command)
    start = [sys.executable, "-m", "openneutron"] if words[0] == "openneutron" else [words[0]]
    done = subprocess.run([*start, *words[1:]], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode in (0, 1), f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def difference(printed: str, expected: str) -> str | None:
    """Returns the first expected line that was not printed; None if all were."""
    lines = [" ".join(line.split()) for line in printed.splitlines() if _has_words(line)]
    wanted = [" ".join(line.split()) for line in expected.splitlines() if _has_words(line)]
    position, skips = 0, False
    for line in wanted:
        if line == "...":
            skips = True
            continue
        while skips and position < len(lines) and not _matches(lines[position], line):
            position += 1
        if position >= len(lines) or not _matches(lines[position], line):
            return f"the page shows: {line}"
        position, skips = position + 1, False
    return None if skips or position == len(lines) else f"the page does not show: {lines[position]}"


def _has_words(line: str) -> bool:
    """Whether a line is neither blank nor a border of a table."""
    return line.strip() == "..." or any(letter.isalnum() for letter in line)


def _matches(line: str, wanted: str) -> bool:
    parts = [re.escape(part) for part in re.split(_NUMBER, wanted)]
    numbers = _NUMBER.findall(wanted)
    pattern = parts[0] + "".join(f"({_NUMBER.pattern}){part}" for part in parts[1:])
    found = re.fullmatch(pattern.replace(re.escape("..."), ".*?"), line)
    return found is not None and all(
        _is_close(one, other, of_samples="%" in wanted) for one, other in zip(found.groups(), numbers, strict=True)
    )


def _is_close(found: str, wanted: str, *, of_samples: bool) -> bool:
    a, b = float(found.replace(",", "")), float(wanted.replace(",", ""))
    if "." in wanted:
        return abs(a - b) <= max(1.5, 0.1 * abs(b))
    return abs(a - b) <= (0.05 * abs(b) if abs(b) >= 1000 else 3 if of_samples else 0)

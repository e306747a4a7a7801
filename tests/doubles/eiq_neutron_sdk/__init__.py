"""Test double of the vendor's package, which is not available here.

It has the interface that the project's documents describe. The environment variable `NEUTRON_DOUBLE` controls it.
"""

from collections.abc import Sequence
from pathlib import Path

__all__ = ["merge_kernel_selection_files"]


def merge_kernel_selection_files(files: Sequence[str], output: str) -> None:
    lines = dict.fromkeys(line for file in files for line in Path(file).read_text().splitlines())
    Path(output).write_text("\n".join(lines) + "\n")

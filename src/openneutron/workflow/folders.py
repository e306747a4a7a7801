"""The folder of a build, or a bare program."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from openneutron.core.files import read_file
from openneutron.errors import InputError
from openneutron.page import Summary, summarize
from openneutron.settings.toml import FILE_NAME
from openneutron.targets import Target
from openneutron.workflow.building import PROGRAM, QUANTIZED, SUMMARY

__all__ = ["BuildFolder"]


@dataclass(frozen=True)
class BuildFolder:
    """The files of a build. For a bare program, all but `program` are None."""

    program: Path
    quantized: Path | None = None
    summary_file: Path | None = None
    settings: Path | None = None

    @classmethod
    def of(cls, path: Path) -> BuildFolder:
        """Returns the files of a folder, or those of a program. Raises `InputError` for a folder without a program."""
        if not path.is_dir():
            return cls(path)
        if not (path / PROGRAM).is_file():
            raise InputError(f"The folder '{path}' has no {PROGRAM}. Give the folder of a build, or a program (.pte).")
        others = (path / name for name in (QUANTIZED, SUMMARY, FILE_NAME))
        return cls(path / PROGRAM, *(one if one.is_file() else None for one in others))

    def summary(self, target: Target | None = None) -> Summary:
        """Returns the summary in the folder, or what is known of a bare program.

        `target` is the target of the estimates of a bare program. Raises `FormatError` for a damaged file.
        """
        if self.summary_file is None or target is not None:
            return summarize(self.program.stem, self.program, target=target)
        return Summary.from_json(read_file(self.summary_file), str(self.summary_file))

"""The folder of a build, or a bare program. Verbs that show no summary do not import the page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from openneutron.core.files import is_file, is_folder, read_file
from openneutron.settings.build_files import QUANTIZED, SUMMARY, program_in
from openneutron.settings.toml import FILE_NAME, read_settings
from openneutron.targets import NeutronTargetSpec, Target

if TYPE_CHECKING:
    from openneutron.page import Summary
    from openneutron.report.contents import Report

__all__ = ["BuildFolder", "comparable_summaries"]


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
        if not is_folder(path):
            return cls(path)
        program = program_in(path)
        others = (path / name for name in (QUANTIZED, SUMMARY, FILE_NAME))
        return cls(program, *(one if is_file(one) else None for one in others))

    @property
    def target(self) -> str | None:
        """The target of the build, which may be a board or a board file; None for a bare program.

        Raises the errors of `read_settings`.
        """
        return None if self.settings is None else read_settings(self.settings).build.target

    def summary(self, target: Target | None = None) -> Summary:
        """Returns the summary in the folder, or what is known of a bare program.

        `target` is the target of the estimates of a bare program. Raises `FormatError` for a damaged file.
        """
        if self.summary_file is None or target is not None:
            return self.bare_summary(target)
        from openneutron.page import Summary

        return Summary.from_json(read_file(self.summary_file), str(self.summary_file))

    def summary_with_changes(self, report: Report, board: NeutronTargetSpec) -> Summary:
        """Returns the summary with the verdict of `report` on `board`, which includes tried changes of the program.

        The summary in the folder is used if it is about the same board.
        """
        from openneutron.page import with_board_fit

        summary = self.summary()
        if board.board is None or summary.target.board != board.board.name:
            summary = self.bare_summary(board)
        return with_board_fit(summary, report.estimate)

    def bare_summary(self, target: Target | None = None) -> Summary:
        """Returns what the program alone tells, as if the folder had no summary."""
        from openneutron.page import summarize

        return summarize(self.program.stem, self.program, target=target)


def comparable_summaries(
    first: BuildFolder, second: BuildFolder, target: Target | None = None
) -> tuple[Summary, Summary]:
    """Returns summaries of the same kind: those in the folders if both have one, else what both programs tell.

    A bare program has no nodes, so that none of its operators would be found among those of a build.
    """
    if target is None and first.summary_file is not None and second.summary_file is not None:
        return first.summary(), second.summary()
    return first.bare_summary(target), second.bare_summary(target)

"""Profiles of a board: joined with the folder of a build or a package, and fitted to a board file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from openneutron.core.files import check_output, write_file
from openneutron.errors import OptionError
from openneutron.page import Summary
from openneutron.profiling import CostFit, fit_costs, read_profile, with_profile
from openneutron.targets import Board, NeutronTargetSpec, Target, check_board_name, text_of_board
from openneutron.workflow.folders import BuildFolder

__all__ = ["fitted_board", "profiled_summary"]


def profiled_summary(recorded: Path, program: Path, target: Target | None = None) -> Summary:
    """Returns the summary of a program with a profile. Raises the errors of `read_profile` and `joined`."""
    return with_profile(BuildFolder.of(program).summary(), read_profile(recorded), target)


def fitted_board(
    recorded: Sequence[Path], programs: Sequence[Path], output: Path, target: Target | None = None
) -> CostFit:
    """Fits the cost model to profiles, and writes a board file with the coefficients.

    A single program stands for all profiles. `target` is the board or the chip that the file describes otherwise, by
    default that of the first program.

    Raises `OptionError` for different numbers of profiles and programs, and for an output that does not end in .toml,
    the errors of `profiled_summary` and `fit_costs`, and `OutputError` if the file cannot be written.
    """
    if len(programs) not in (1, len(recorded)):
        raise OptionError(
            f"There are {len(recorded)} profiles and {len(programs)} programs. Give --program once for each profile."
        )
    check_board_name(output)
    check_output(output)
    pairs = zip(recorded, list(programs) * (len(recorded) if len(programs) == 1 else 1), strict=True)
    summaries = [profiled_summary(one, program) for one, program in pairs]
    first = summaries[0].target
    chosen = NeutronTargetSpec(target or first.board or first.name).neutron_target
    names = ", ".join(one.name for one in recorded)
    found = fit_costs(summaries, chosen.costs, f"fitted to {names}")
    board = chosen.board or Board(chosen.name, chosen.name)
    write_file(output, text_of_board(replace(board, name=output.stem, costs=found.costs)).encode())
    return found

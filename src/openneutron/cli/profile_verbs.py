"""Verbs that read the profiles of a board: profile, fit-costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from openneutron.cli.paths import board_file_name, existing, existing_file, known_target
from openneutron.cli.terminal import Terminal
from openneutron.cli.verbs import FAILED, add_verb
from openneutron.core.files import check_output

__all__ = ["add_verbs"]

_FORMS = "an ETDump (.etdp), the log of the serial line with profile records, or the bytes of a profile buffer"
Target = Annotated[
    str | None,
    typer.Option(
        callback=known_target,
        help="The target of the estimates: a chip, a board or a board file (.toml). [default: that of the program]",
    ),
]


def add_verbs() -> None:
    """Adds the verbs of this module to the command line."""
    add_verb(profile)
    add_verb(fit_costs)


def profile(
    terminal: Terminal,
    recorded: Annotated[
        Path, typer.Argument(metavar="PROFILE", callback=existing_file, help=f"What the board recorded: {_FORMS}.")
    ],
    program: Annotated[
        Path, typer.Option(callback=existing, help="The program (.pte), or the folder of its build or its package.")
    ],
    *,
    target: Target = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the report page with the profile.")
    ] = None,
) -> None:
    """Join the profile of a board with the program: cycles of each operator and source line, beside the estimate."""
    if output is not None:
        check_output(output)
    from dataclasses import asdict

    from openneutron.cli.tables import blocks_of_profile
    from openneutron.page import write_page
    from openneutron.workflow.profiles import profiled_summary

    summary = profiled_summary(recorded, program, target)
    rows = summary.profile
    assert rows is not None
    if output is not None:
        write_page(output, summary)
    data = {**asdict(rows), "cycles": rows.cycles, "estimated": rows.estimated}
    terminal.show(blocks_of_profile(rows), data | ({} if output is None else {"file": str(output)}))


def fit_costs(
    terminal: Terminal,
    recorded: Annotated[
        list[Path], typer.Argument(metavar="PROFILES", callback=existing_file, help=f"Profiles: {_FORMS}.")
    ],
    program: Annotated[
        list[Path],
        typer.Option(
            callback=existing, help="The program of each profile, in the same order, as for `profile`. Repeatable."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", callback=board_file_name, help="The board file (.toml) to write.")
    ],
    *,
    target: Target = None,
) -> None:
    """Fit the cost model to profiles of a board, and write a board file that --target takes.

    The exit code is 1 if the fit makes the estimates of the profiles worse. The file then has the old coefficients.
    """
    check_output(output)
    from dataclasses import asdict

    from openneutron.workflow.profiles import fitted_board

    found = fitted_board(recorded, program, output, target)
    terminal.show(f"{output}: {found}", {"file": str(output), **asdict(found)})
    if found.kept:
        raise typer.Exit(FAILED)

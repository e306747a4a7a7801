"""The entry point of the command line, with its exit codes."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Annotated

import typer

import openneutron
from openneutron.cli import build_verbs, check_verbs, file_verbs, profile_verbs, target_verb
from openneutron.cli.closed_streams import EXIT_CODE, closed_streams, watch_streams
from openneutron.cli.interrupts import restored_signals
from openneutron.cli.terminal import print_error
from openneutron.cli.verbs import WRONG_USE, app
from openneutron.core.waiting import WAIT_POLICY
from openneutron.errors import OpenNeutronError, OptionError

__all__ = ["main"]

build_verbs.add_verbs()
check_verbs.add_verbs()
file_verbs.add_verbs()
profile_verbs.add_verbs()
target_verb.add_verbs()


def _show_version(shown: bool) -> None:
    if shown:
        typer.echo(f"openneutron {openneutron.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Quantize PyTorch models for NXP's eIQ Neutron NPU, and build, run and check their programs."""


SHORT_FORMS = {"--rgb": "--channels=rgb", "--bgr": "--channels=bgr"}
"""Options that stand for an option with its value."""
MAY_BE_EMPTY = frozenset({"--args", "--extra-flags", "--input"})
"""Options whose value may be an empty text: no arguments, no flags, a scalar."""
_IS_EMPTY = "is empty. Give a value; if it is a variable of the shell, set it."


def check_values(arguments: Sequence[str]) -> None:
    """Raises `OptionError` for an empty argument or value, as a variable of the shell without a value leaves it.

    Every text after "--" is an argument.
    """
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    if "" in arguments[end:]:
        raise OptionError(f"An argument {_IS_EMPTY}")
    for before, argument in pairwise(["", *arguments[:end]]):
        option, equals, value = argument.partition("=")
        if argument == "" and before not in MAY_BE_EMPTY:
            what = f"The value of {before}" if before.startswith("-") else "An argument"
            raise OptionError(f"{what} {_IS_EMPTY}")
        if option.startswith("--") and equals and not value and option not in MAY_BE_EMPTY:
            raise OptionError(f"The value of {option} is empty. Give a value.")


def in_long_form(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments with the options that `SHORT_FORMS` stand for. Every text after "--" stays as it is."""
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    return [*(SHORT_FORMS.get(one, one) for one in arguments[:end]), *arguments[end:]]


def main(arguments: Sequence[str] | None = None, *, ends_process: bool = False) -> None:
    """Runs the command line, and exits. Errors of OpenNeutron are printed without a traceback.

    `arguments` are those after the name of the program, by default those of the process. With `ends_process`, a process
    that ends because of a signal ignores further ones, so that they do not interrupt its end. If the reader of stdout
    or stderr closes its pipe (`| head -1`), the verb still writes its files, and the process ends with `EXIT_CODE`.
    """
    os.environ.setdefault(WAIT_POLICY, "PASSIVE")
    if ends_process:
        watch_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files and boxes of tables may have other characters
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with nullcontext() if ends_process else restored_signals():
            given = in_long_form(sys.argv[1:] if arguments is None else arguments)
            check_values(given)
            app(args=given)
    except OpenNeutronError as error:
        print_error(str(error))
        sys.exit(WRONG_USE)
    except SystemExit as end:
        if ends_process and end.code in (0, None) and closed_streams():
            sys.exit(EXIT_CODE)
        raise

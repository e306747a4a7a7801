"""The output of the command line: results on stdout, and steps, warnings and errors on stderr."""

from __future__ import annotations

import json
import logging
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from typing import Any, TextIO

from rich.console import Console, Group
from rich.text import Text

from openneutron.cli.interrupts import Interrupts
from openneutron.core.json_values import without_infinite_numbers
from openneutron.core.progress import shown_step

__all__ = ["Terminal", "command_line", "print_error"]

WIDTH = 160
"""The width of output that goes to a file or another program."""
LOGGERS_OF_RAISED_ERRORS = (
    "torch._dynamo.guards", "torch._guards", "torch._subclasses.fake_tensor", "torch.export._trace",
    "torch.fx.experimental.recording",
)  # fmt: skip
"""Loggers of torch that log an error with its traceback and then raise it. The message of the verb reports it."""


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else WIDTH
    return Console(file=stream, width=width, soft_wrap=True, highlight=False)


def print_error(message: str) -> None:
    """Prints "error: message" to stderr."""
    _print_with_label("error", "bold red", message, _console(stderr=True))


def _print_with_label(label: str, style: str, message: str, console: Console) -> None:
    text = Text(f"{label}: {message}")
    text.stylize(style, 0, len(label))
    console.print(_wrapped(text, console))


def command_line(text: str) -> Text:
    """Returns a text in one line, which a user can copy from a terminal."""
    return Text(text, no_wrap=True)


def _wrapped(content: Any, console: Console) -> Any:
    """Returns texts whose lines end between words if `console` is a terminal; other results unchanged.

    A word that is longer than a line, such as a path, is not broken. Each row of a text table stays one line.
    """
    if not console.is_terminal:
        return content
    if isinstance(content, Group):
        return Group(*(_wrapped(one, console) for one in content.renderables))
    text = Text(content) if isinstance(content, str) else content
    if not isinstance(text, Text) or text.no_wrap:
        return content
    found = text.copy()
    found.plain = "\n".join(_wrapped_line(line, console.width) for line in text.plain.split("\n"))
    return found


def _wrapped_line(line: str, width: int) -> str:
    indent = line[: len(line) - len(line.lstrip())]
    if "  " in line.strip() or len(indent) >= width // 2:
        return line
    options: Any = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(line, width, subsequent_indent=indent, **options)


def _refuse(_: logging.LogRecord) -> bool:
    return False


@dataclass(frozen=True)
class Terminal:
    """The output of one verb.

    - `json`: results are printed as one JSON document, and nothing else goes to stdout: what the user's own code
      prints goes to stderr.
    - `quiet`: only results, warnings and errors are printed.
    - `verbose`: messages of the log are printed, too.
    """

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    interrupts: Interrupts = field(default_factory=Interrupts)
    stdout: TextIO = field(default_factory=lambda: sys.stdout)
    out: Console = field(default_factory=lambda: _console(stderr=False))
    err: Console = field(default_factory=lambda: _console(stderr=True))

    def show(self, result: Any, data: Any) -> None:
        """Prints a result: `data` as JSON with the option --json, else `result`, a text or an object of rich."""
        if self.json:
            self.stdout.write(json.dumps(without_infinite_numbers(data), indent=2, allow_nan=False) + "\n")
        else:
            self.out.print(_wrapped(result, self.out), markup=False)

    def note(self, text: str) -> None:
        """Prints a line about the progress, such as the name of a file that was written."""
        if not self.quiet:
            self.err.print(_wrapped(text, self.err), markup=False)

    @property
    def shows_progress(self) -> bool:
        """Whether bars and spinners are shown. A terminal with TERM=dumb cannot move its cursor."""
        return not self.quiet and self.err.is_terminal and not self.err.is_dumb_terminal

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Shows that a step runs, with bars and the expected time, and its seconds when it has ended.

        Raises `KeyboardInterrupt` at both ends if Ctrl-C was pressed.
        """
        self.interrupts.check()
        begin = time.perf_counter()
        if self.shows_progress:
            with shown_step(title, self.err):
                yield
        else:
            yield
        self.interrupts.check()
        self.note(f"{title}: {time.perf_counter() - begin:.1f} s")

    @contextmanager
    def messages(self) -> Iterator[None]:
        """Prints each warning of OpenNeutron once, in one line, and the errors that are logged; all with `verbose`.

        Warnings of other packages are about their own internals, as are errors that torch logs before it raises them.
        They are printed with `verbose`, which also prints the messages of OpenNeutron's log, but not those of others.
        """
        own_logger = logging.getLogger("openneutron")
        level = own_logger.level
        silenced = () if self.verbose else tuple(map(logging.getLogger, LOGGERS_OF_RAISED_ERRORS))
        redirected: AbstractContextManager[Any] = redirect_stdout(sys.stderr) if self.json else nullcontext()
        if self.verbose:
            logging.basicConfig(level=logging.ERROR, stream=sys.stderr, format="%(name)s: %(message)s")
            own_logger.setLevel(logging.INFO)
        else:
            logging.disable(logging.WARNING)
        for logger in silenced:
            logger.addFilter(_refuse)
        try:
            with warnings.catch_warnings(), redirected:
                warnings.simplefilter("default")
                warnings.showwarning = self._show_warning  # type: ignore[assignment]
                yield
        finally:
            logging.disable(logging.NOTSET)
            own_logger.setLevel(level)
            for logger in silenced:
                logger.removeFilter(_refuse)

    def _show_warning(self, message: Warning | str, category: type[Warning], *_: Any) -> None:
        if category.__module__.startswith("openneutron") or self.verbose:
            _print_with_label("warning", "bold yellow", str(message), self.err)

"""Makes commands of typer from functions and from the declared settings."""

from __future__ import annotations

import functools
import inspect
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from openneutron.cli.help import Command
from openneutron.cli.interrupts import Interrupts
from openneutron.cli.paths import check_no_input, existing_file, file_reader
from openneutron.cli.terminal import Terminal, print_error
from openneutron.core.ctrl_c import INTERRUPTED
from openneutron.core.files import is_file
from openneutron.core.messages import as_sentence, first_line
from openneutron.errors import OpenNeutronError
from openneutron.settings import Field, Settings, fields_of, read_settings
from openneutron.settings.toml import FILE_NAME

__all__ = ["FAILED", "FAULT", "INTERRUPTED", "WRONG_USE", "add_verb", "app"]

app = typer.Typer(
    no_args_is_help=True,
    help="Quantize PyTorch models for NXP's eIQ Neutron NPU, and build, run and check their programs.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

FAILED, WRONG_USE, FAULT = 1, 2, 3
"""The exit codes: a check failed; wrong use or input; a fault of OpenNeutron. 0 is success.

Ctrl-C ends a verb with `INTERRUPTED`, SIGTERM with 143, and SIGHUP with 129."""
_BEFORE_SIGNALS = 128  # the exit code for a signal is this plus its number

_TYPES = {"bool": bool, "int": int, "float": float, "str": str, "tuple[float, ...]": str, "tuple[str, ...]": list[str]}
_NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"
_OUTPUTS = ("output", "table")
"""The names of the parameters that are files or folders to write, and may not replace inputs."""
_WRITTEN = (*_OUTPUTS, "intermediates_dir")
_SHORT = {"neutron_converter_flavor": ("--flavor",)}

Config = Annotated[
    Path | None, typer.Option("--config", "-c", callback=existing_file, help="An openneutron.toml with settings.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results, warnings and errors only.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print what is read and done, too, and warnings of other packages.")
]


def add_verb(
    function: Callable[..., None],
    *,
    sections: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
    model_is_argument: bool = False,
) -> None:
    """Adds a function as a verb of the same name.

    The function gets a `Terminal` as its first argument. With `sections`, it gets `Settings` as its second argument,
    and the verb has `--config` and an option for each setting of these sections, except those in `without`. With
    `model_is_argument`, the setting `model` is an argument of the verb instead of an option. The other parameters are
    those of typer. If a parameter `program` or `file` is the folder of a build, its openneutron.toml is used unless
    `--config` names another.
    """
    own = list(inspect.signature(function, eval_str=True).parameters.values())[2 if sections else 1 :]
    fields = [one for section in sections for one in fields_of(section) if one.name not in without]
    settings = [_parameter(one, model_is_argument) for one in fields]
    first = [one for one in settings if one.name == "model" and model_is_argument]
    rest = [one for one in settings if one not in first]
    config = [_keyword("config", Config, None)] if sections else []
    common = [_keyword("json", Json, False), _keyword("quiet", Quiet, False), _keyword("verbose", Verbose, False)]
    own = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own]
    names = frozenset(one.name for one in settings)
    readers = {one.name: reader for one in own if (reader := file_reader(one)) is not None}
    verb = _runner(function, names if sections else None, readers)
    parameters = [*first, *own, *config, *rest, *common]
    verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    verb.__annotations__ = {one.name: one.annotation for one in parameters}
    app.command(function.__name__.replace("_", "-"), cls=Command)(verb)


def _runner(
    function: Callable[..., None], names: frozenset[str] | None, readers: Mapping[str, Callable[[Path], Path]]
) -> Callable[..., None]:
    """Returns the function of a verb: it reads the settings, checks that no input is overwritten, and calls `function`.

    `names` are the settings among its options; None for a function without `Settings`. `readers` are those of
    `file_reader`, by the names of the parameters.
    """

    @functools.wraps(function)
    def verb(json: bool, quiet: bool, verbose: bool, **values: Any) -> None:
        interrupts = Interrupts()
        terminal = Terminal(json, quiet, verbose, interrupts)
        with terminal.messages(), _typed_exits(interrupts, verbose=verbose):
            if names is None:
                _check_outputs(values, _paths_in(values, readers))
                function(terminal, **values)
                return
            given = {name: value for name, value in values.items() if name in names and value not in (None, [])}
            others = {name: value for name, value in values.items() if name not in names and name != "config"}
            config = values["config"] or _config_in(others.get("program") or others.get("file"))
            settings = _settings(config, given)
            named = [*map(Path, settings.paths()), *([config] if config is not None else [])]
            _check_outputs(others, [*_paths_in(others, readers), *named])
            function(terminal, settings, **others)

    del verb.__wrapped__
    return verb


@contextmanager
def _typed_exits(interrupts: Interrupts, *, verbose: bool) -> Iterator[None]:
    """Ends the process with a message and an exit code for all exceptions, and with a traceback if it is `verbose`."""
    try:
        with interrupts:
            yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except KeyboardInterrupt as error:
        raise _interrupted(interrupts.number) from error
    except Exception as error:
        if verbose:
            traceback.print_exc()
        if interrupts.seen:  # a library made another error of it
            raise _interrupted(interrupts.number) from error
        if isinstance(error, OpenNeutronError):
            raise
        if _is_limit(error):
            print_error(_reason(error))
            raise typer.Exit(WRONG_USE) from error
        print_error(
            f"{type(error).__name__}: {as_sentence(first_line(error))} This is a fault of OpenNeutron. Run the command "
            "again with --verbose, and report the traceback that it prints."
        )
        raise typer.Exit(FAULT) from error


def _interrupted(number: int | None) -> typer.Exit:
    """Returns the exit code after a signal, as shells define it: 128 plus its number, so 130 for Ctrl-C."""
    is_ended = number is not None and number != signal.SIGINT
    what = f"ended by {signal.Signals(number).name}" if number is not None and is_ended else "interrupted"
    print_error(f"{what}. Files that were complete are kept, and no file is half-written.")
    return typer.Exit(_BEFORE_SIGNALS + number if number is not None and is_ended else INTERRUPTED)


def _is_limit(error: Exception) -> bool:
    """Whether an error reports a limit of this machine. torch reports a lack of memory as a `RuntimeError`."""
    return isinstance(error, (MemoryError, OSError)) or (isinstance(error, RuntimeError) and _NO_MEMORY in str(error))


def _reason(error: Exception) -> str:
    """Returns the message about a limit of this machine: no memory, no rights, no space."""
    if not isinstance(error, OSError):
        return "There is not enough memory. Use fewer processes (--jobs), a smaller --batch-size or fewer samples."
    file = f"'{error.filename}': " if error.filename else ""
    return f"{file}{error.strerror or first_line(error)}."


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _parameter(declared: Field, model_is_argument: bool) -> inspect.Parameter:
    """Returns the parameter of a setting. Its default is None, which says that the setting is not given."""
    text = declared.help
    if declared.choices:
        text += f" One of {', '.join(declared.choices)}."
    if declared.default not in (None, (), False):
        text += f" Default: {_shown(declared.default)}."
    kind = _TYPES[declared.kind]
    panel = f"Options: {declared.section}"
    if declared.name == "model" and model_is_argument:
        annotation = Annotated[str | None, typer.Argument(metavar="MODEL", help=text, show_default=False)]
        return _keyword(declared.name, annotation, None)
    option = f"--{declared.name.replace('_', '-')}"
    flags = [f"{option}/--no-{option[2:]}"] if kind is bool else [option, *_SHORT.get(declared.name, ())]
    info = typer.Option(*flags, metavar=declared.metavar, help=text, show_default=False, rich_help_panel=panel)
    return _keyword(declared.name, Annotated[kind | None, info], None)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _config_in(program: Path | None) -> Path | None:
    """Returns the openneutron.toml of a folder of a build; None for a bare program."""
    file = None if program is None else program / FILE_NAME
    return file if file is not None and is_file(file) else None


def _check_outputs(values: Mapping[str, Any], inputs: Sequence[Path]) -> None:
    for name in _OUTPUTS:
        check_no_input(values.get(name), inputs)


def _paths_in(values: Mapping[str, Any], readers: Mapping[str, Callable[[Path], Path]]) -> list[Path]:
    """Returns the paths that a verb reads, among the values of its own parameters.

    `readers` maps the name of a parameter to the function from the folder of a build to its file.
    """
    values = {
        name: readers[name](value) if name in readers and isinstance(value, Path) else value
        for name, value in values.items()
    }
    lists = (value if isinstance(value, list) else [value] for name, value in values.items() if name not in _WRITTEN)
    found = [one for values in lists for one in values if isinstance(one, (str, Path))]
    return [*map(Path, found), *(Path(one.rpartition("=")[2]) for one in found if isinstance(one, str))]  # name=file


def _settings(config: Path | None, given: Mapping[str, Any]) -> Settings:
    return Settings.of(given) if config is None else read_settings(config, given)

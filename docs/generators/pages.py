"""Writes the pages of the site that follow from the sources: commands, settings, targets, messages, Python names."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import typer
from docs.generators.cures import cure_of, says_its_cure
from docs.generators.messages import PACKAGE, Message, collect_messages
from docs.generators.results import results

import openneutron
import openneutron.cli.main  # adds the verbs to the command line
from openneutron import errors
from openneutron.cli.verbs import app
from openneutron.settings import SECTIONS, Field, fields_of, template
from openneutron.settings.values import KINDS
from openneutron.targets import ROLES, TARGETS, Board, boards

__all__ = [
    "PAGES",
    "PYTHON_PACKAGES",
    "commands",
    "public_names",
    "python_page",
    "settings",
    "targets",
    "troubleshooting",
]

PYTHON_PACKAGES = tuple(
    name
    for name in (
        "openneutron", "openneutron.accuracy", "openneutron.data", "openneutron.recovery", "openneutron.runtime",
        "openneutron.quantizer", "openneutron.firmware", "openneutron.page", "openneutron.errors",
        "openneutron.targets",
    )
    if name == "openneutron" or any(PACKAGE.glob(f"{name.split('.')[1]}*"))
)  # fmt: skip
"""The packages whose public names the reference lists."""


def troubleshooting(messages: Iterable[Message] | None = None) -> str:
    """Returns the page of all errors and warnings, by class and by the room of the package that raises them."""
    found = collect_messages() if messages is None else messages
    by_kind = {kind: list(some) for kind, some in groupby(sorted(found, key=_by_kind), key=lambda one: one.kind)}
    blocks = [
        "# Errors and warnings",
        "This page is generated from the sources of OpenNeutron. It lists every message of an error and a warning, by "
        "the class of the error. Search it for a part of your message that contains no name or number of yours: those "
        "are shown as ‹placeholders›.",
        "Most messages say what to do. For the others, the cure is below the message. Messages about a node of the "
        "model end with its name, its operator and the line of your code: `[node 'conv2d', aten.conv2d.default, at "
        "net.py:12]`.",
        "The reasons for operators on the CPU are not errors. `program.placement` shows them, and "
        "[Operators](operators.md) lists all.",
    ]
    for kind, some in by_kind.items():
        blocks += [f"## {kind}", *_cause_of_kind(kind)]
        for room, ones in groupby(some, key=lambda one: one.room):
            blocks += [f"**Raised in `{room}`**", "\n\n".join(_bullet(one) for one in ones)]
    return "\n\n".join(blocks) + "\n"


def _by_kind(message: Message) -> tuple[bool, bool, str, str, str]:
    """Sorts errors of OpenNeutron before warnings, and both before other exceptions."""
    own = hasattr(errors, message.kind)
    return (not own, "Warning" not in message.kind, message.kind, message.room, message.text)


def _cause_of_kind(kind: str) -> list[str]:
    described = inspect.getdoc(getattr(errors, kind, None)) if hasattr(errors, kind) else None
    if described is not None:
        return [described.split("\n\n")[0].replace("\n", " ")]
    return [_OTHER_KINDS[kind]] if kind in _OTHER_KINDS else []


_OTHER_KINDS = {
    "CpuWarning": "Operators run on the CPU.",
    "UnquantizedWarning": "Operators stay in float, so that they run on the CPU.",
    "FloatIOWarning": "Inputs or outputs remain in float although `int8_io` is set.",
    "CoarseSoftmaxWarning": "A softmax over many values loses its small probabilities; see "
    "[Softmaxes over many values](options.md#softmaxes-over-many-values).",
    "VanishingValuesWarning": "The values of a tensor are too small for int8; see "
    "[Values far from 1](options.md#values-far-from-1).",
    "ConverterWarning": "NXP's converter is missing, or printed something unknown.",
    "WeightsWarning": "A file of weights has tensors that the model does not have.",
    "WorkerWarning": "Processes of `jobs` failed or are too many.",
    "DeprecationWarning": "A name has changed.",
    "IRError": "The check of the compiler's graph after a pass failed.",
    "AssertionError": "A check of OpenNeutron's own work failed.",
}


def _bullet(message: Message) -> str:
    lines = [f"- {_quoted(message.text)}"]
    if message.continuations:
        lines.append("    - It may contain: " + "; ".join(_quoted(one) for one in message.continuations))
    if not says_its_cure(message):
        lines.append(f"    - *Cure:* {cure_of(message) or ''}")
    return "\n\n".join(lines)


def _quoted(text: str) -> str:
    """Returns a message as Markdown that is shown as it is written."""
    escaped = text.strip().replace("&", "&amp;").replace("<", "&lt;").replace("\\", "\\\\")
    for mark in "*_`[]{}#":
        escaped = escaped.replace(mark, "\\" + mark)
    return escaped.replace("\n", " ⏎ ")


def commands() -> str:
    """Returns the page of all verbs of the command line with their arguments and options."""
    group: Any = typer.main.get_command(app)
    blocks = [
        "# Commands",
        "This page is generated from the commands. `openneutron VERB --help` prints the same.",
        "\n".join(f"- [`{name}`](#openneutron-{name}): {_first_sentence(one.help)}" for name, one in _verbs(group)),
        "All verbs have `--json` (the result as one [JSON document](results.md) on stdout), `--quiet` and `--verbose`. "
        "`openneutron --version` prints the version, and `openneutron --install-completion` installs completion for "
        "your shell. Results are printed to stdout; steps, warnings and errors to stderr.",
        "| exit code | meaning |\n|---|---|\n| 0 | success |\n| 1 | a check failed, for example a limit of `validate` "
        "|\n| 2 | wrong use or input: the message says what to correct |\n| 3 | a fault of OpenNeutron |\n"
        "| 130 | interrupted with Ctrl-C; files are complete or absent |\n"
        "| 141 | the reader of the output closed its pipe, as `head` does; all files were written |\n"
        "| 143, 129 | ended by SIGTERM or SIGHUP; files are complete or absent |",
    ]
    for name, verb in _verbs(group):
        usage = " ".join([f"openneutron {name}", "[OPTIONS]", *map(_usage, _arguments(verb))])
        blocks += [f"## openneutron {name}", f"    {usage}", inspect.cleandoc(verb.help or "")]
        if _arguments(verb):
            blocks.append(_rows(("argument", "meaning"), ((f"`{_usage(one)}`", one.help) for one in _arguments(verb))))
        for panel, options in groupby(_options(verb), key=lambda one: one.rich_help_panel or "Options"):
            blocks += [f"**{panel}**", _rows(("option", "meaning"), ((_flags(one), one.help) for one in options))]
    return "\n\n".join(blocks) + "\n"


def _verbs(group: Any) -> list[tuple[str, Any]]:
    return [(name, one) for name, one in group.commands.items() if not one.hidden]


def _arguments(verb: Any) -> list[Any]:
    return [one for one in verb.params if one.param_type_name == "argument"]


def _options(verb: Any) -> list[Any]:
    shown = [one for one in verb.params if one.param_type_name == "option" and not one.hidden]
    return sorted(shown, key=lambda one: one.rich_help_panel or "")


def _usage(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    more = "..." if argument.nargs == -1 else ""
    return f"{name}{more}" if argument.required else f"[{name}]{more}"


def _flags(option: Any) -> str:
    flags = ", ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts))
    return flags if option.is_flag else f"{flags} {option.metavar or option.name.upper()}"


def settings() -> str:
    """Returns the page of all settings of `openneutron.toml`."""
    blocks = [
        "# Settings: openneutron.toml",
        "This page is generated from the declaration of the settings. `openneutron init` writes a file with all of "
        "them as comments, and `openneutron build` writes the settings that it used. Each setting is an option of the "
        "command line too: `recovery_seconds` is `--recovery-seconds`. Options of the command line replace the "
        "settings of the file. Relative paths are relative to the folder of the file. An unknown key is an error that "
        "names similar keys.",
    ]
    for section, kind in SECTIONS.items():
        rows = ((f"`{one.name}`", _kind(one), _default(one), one.help) for one in fields_of(section))
        blocks += [f"## [{section}]", kind.__doc__ or "", _rows(("key", "value", "default", "meaning"), rows)]
    blocks += ["## A file with every setting", f"```toml\n{template()}```"]
    return "\n\n".join(blocks) + "\n"


def _kind(declared: Field) -> str:
    return ", ".join(f"`{one}`" for one in declared.choices) or KINDS[declared.kind]


def _default(declared: Field) -> str:
    value = declared.default
    return "" if value in (None, ()) else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def targets() -> str:
    """Returns the page of all targets with their properties."""
    blocks = [
        "# Targets",
        "This page is generated from `openneutron.targets`. `openneutron targets` prints the targets and the installed "
        "converters. Properties that NXP does not publish are unknown, and estimates that need them are, too.",
    ]
    columns: Mapping[str, Callable[[Any], Any]] = {
        "target": lambda one: f"`{one.name}`",
        "SoC": lambda one: one.soc,
        "NPU": lambda one: one.npu,
        "class": lambda one: one.neutron_class,
        "MACs per cycle": lambda one: one.macs_per_cycle,
        "pipelines": lambda one: one.pipelines,
        "MACs per pipeline": lambda one: one.macs_per_pipeline,
        "clock": lambda one: one.clock_hz and f"{one.clock_hz / 1e6:g} MHz",
        "SRAM": lambda one: one.sram_bytes and f"{one.sram_bytes / 1024:g} KiB",
        "flash": lambda one: one.flash_bytes and f"{one.flash_bytes / 1024:g} KiB",
    }
    rows = (
        ["unknown" if (cell := of(one)) is None else str(cell) for of in columns.values()] for one in TARGETS.values()
    )
    blocks += [
        _rows(tuple(columns), rows),
        "Neutron-C is an NPU that the processor of the SoC controls; Neutron-S is a subsystem with a controller of "
        "its own. The MACs per pipeline decide which operators must be padded ([Operators](../operators.md)).",
        "## Boards",
        "`--target` and the argument `target` also take the name of a board, and the path of a board file of your own "
        "([Describe your board](../howto/board-file.md)). The model is compiled for the board's chip; estimates use "
        "the memory and the clock of the board. `openneutron targets show NAME` prints the sources of all numbers.",
        *(block for board in boards().values() for block in _board(board)),
        "## Converter flavours",
        'A flavour is a release of NXP\'s converter: an MCUXpresso release such as "SDK_25_06", or a version of '
        '`eiq_neutron_sdk` such as "3.1.3". Microcode and the firmware of the board must have the same release. '
        "Releases "
        "up to 25.12, and versions before 3.1.3, are the *legacy* generation, which has more limits of operators. "
        "Without a flavour, the limits of the *modern* generation hold. Weights with a scale per channel need "
        "SDK_25_09 or later.",
        'Give the flavour as `neutron_converter_flavor="SDK_25_06"` in Python, or `--flavor SDK_25_06` on the command '
        "line.",
    ]
    return "\n\n".join(blocks) + "\n"


def _board(board: Board) -> Iterator[str]:
    clock = "unknown" if board.clocks.cpu_hz is None else f"{board.clocks.cpu_hz / 1e6:g} MHz"
    yield f"### {board.name}"
    yield f"{board.title}, with `{board.chip}`. Clock of the processor: {clock}."
    rows = (
        (
            f"`{one.name}`",
            one.kind,
            "unknown" if one.bytes is None else f"{one.bytes / 1024:g} KiB",
            "unknown" if one.start is None else f"`{one.start:#010x}`",
            {None: "unknown", True: "yes", False: "no"}[one.npu_reads],
            ", ".join(role for role in ROLES if one in board.may_hold(role)) or "nothing",
            one.source or "unknown",
        )
        for one in board.regions
    )
    yield _rows(("region", "kind", "size", "address", "NPU reads it", "may hold", "source"), rows)


def python_page(package: str) -> str:
    """Returns the page of the public names of a package, which mkdocstrings fills from their docstrings."""
    module = ast.parse(_init_of(package).read_text())
    names = public_names(package)
    blocks = [
        f"# {package}",
        inspect.cleandoc(ast.get_docstring(module) or ""),
        ", ".join(f"[`{name}`](#{package}.{name})" for name in names),
        *(f"::: {package}.{name}" for name in names),
    ]
    return "\n\n".join(blocks) + "\n"


def _init_of(package: str) -> Path:
    folder = PACKAGE.parent.joinpath(*package.split("."))
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")


def public_names(package: str) -> list[str]:
    """Returns the names in `__all__` of a package, without importing its modules."""
    if package == "openneutron":
        return list(openneutron.__all__)
    for node in ast.parse(_init_of(package).read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return sorted(ast.literal_eval(node.value), key=str.lower)
    raise ValueError(f"{package} has no list __all__.")


def _first_sentence(text: str | None) -> str:
    return (text or "").split("\n\n")[0].replace("\n", " ")


def _rows(head: tuple[str, ...], rows: Iterable[Iterable[Any]]) -> str:
    return "\n".join(_lines(head, rows))


def _lines(head: tuple[str, ...], rows: Iterable[Iterable[Any]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join('---' for _ in head)} |"
    for row in rows:
        yield f"| {' | '.join(str(cell or '').replace('|', chr(92) + '|') for cell in row)} |"


PAGES: Mapping[str, Callable[[], str]] = {
    "troubleshooting.md": troubleshooting,
    "reference/commands.md": commands,
    "reference/results.md": results,
    "reference/settings.md": settings,
    "reference/targets.md": targets,
    **{f"reference/python/{name}.md": (lambda name=name: python_page(name)) for name in PYTHON_PACKAGES},  # type: ignore[misc]
}
"""The generated pages: the path in docs/, and the function that returns its text."""

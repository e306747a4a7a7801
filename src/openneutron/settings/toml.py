"""Reads and writes `openneutron.toml`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from openneutron.core.files import read_file, write_file
from openneutron.core.messages import did_you_mean, is_unicode, printable
from openneutron.core.toml_values import parsed_toml
from openneutron.errors import OptionError
from openneutron.settings.declaration import SECTIONS, Field, Settings, fields_of

__all__ = ["FILE_NAME", "read_settings", "settings_text", "template", "write_settings"]

FILE_NAME = "openneutron.toml"
_HEADER = (
    "Settings of `openneutron build`. Run `openneutron build --config openneutron.toml` to build with them.",
    "Relative paths are relative to the folder of this file. Options of the command line replace these settings.",
)


def read_settings(file: str | os.PathLike[str], given: Mapping[str, Any] | None = None) -> Settings:
    """Reads settings from a file, and replaces those in `given`, by name; values None in `given` are ignored.

    Paths in the file are relative to its folder; the result holds them relative to the current folder. Raises
    `InputError` if the file cannot be read, and `OptionError` for a file that is no TOML, for an unknown key and for a
    wrong value.
    """
    path = Path(file)
    content = read_file(path)
    try:
        tables = parsed_toml(content)
    except ValueError as error:
        raise OptionError(f"'{path}' is not valid TOML: {error}.") from error
    values: dict[str, Any] = {}
    for section, table in tables.items():
        if section not in SECTIONS:
            raise OptionError(
                f"'{path}' has no section [{section}].{did_you_mean(section, SECTIONS)}{_home_of(section)}"
            )
        if not isinstance(table, dict):
            raise OptionError(f"'{path}': '{section}' must be a table, [{section}].")
        values.update(_values(path, section, table))
    return Settings.of({**values, **{name: value for name, value in (given or {}).items() if value is not None}})


def _values(path: Path, section: str, table: Mapping[str, Any]) -> dict[str, Any]:
    known = {one.name: one for one in fields_of(section)}
    for name in table:
        if name not in known:
            hint = did_you_mean(name, known) + _home_of(name) or _near_key(name)
            raise OptionError(f"'{path}': [{section}] has no key '{name}'.{hint}")
    return {name: _from_folder(known[name], value, path.parent) for name, value in table.items()}


def _near_key(name: str) -> str:
    """Returns a sentence about a key of any section with a similar name; empty without one."""
    homes = {one.name: section for section in SECTIONS for one in fields_of(section)}
    near = get_close_matches(name, homes, 1)
    return f" Did you mean '{near[0]}', which belongs to [{homes[near[0]]}]?" if near else ""


def _home_of(name: str) -> str:
    homes = [section for section in SECTIONS if any(one.name == name for one in fields_of(section))]
    return f" The key '{name}' belongs to [{homes[0]}]." if homes else ""


def _from_folder(declared: Field, value: Any, folder: Path) -> Any:
    """Returns a value of a file in `folder`, with its path relative to the current folder."""
    path = declared.path_in(value)
    if not path:
        return value
    shown = os.path.normpath(folder / path)
    # After a symbolic link to a folder, ".." is the parent of the folder that the link names.
    real = os.path.realpath(os.path.join(os.path.realpath(folder), path))
    return declared.not_a_word((shown if os.path.realpath(shown) == real else real) + value[len(path) :])


def write_settings(file: str | os.PathLike[str], settings: Settings) -> None:
    """Writes the settings that differ from the defaults. Paths become relative to the folder of `file`.

    Raises `OutputError` if the file cannot be written, and `OptionError` as `settings_text` does.
    """
    write_file(file, settings_text(settings, Path(file).parent).encode())


def settings_text(settings: Settings, folder: Path) -> str:
    """Returns the content of an `openneutron.toml` in `folder`, with the settings that differ from the defaults.

    Raises `OptionError` for a path that TOML cannot hold, because its name is not UTF-8.
    """
    import tomlkit

    document = _document(_HEADER)
    for section, values in settings.given().items():
        if not values:
            continue
        table = tomlkit.table()
        known = {one.name: one for one in fields_of(section)}
        for name, value in values.items():
            table.add(name, _to_folder(known[name], value, folder))
        document.add(section, table)
    text = tomlkit.dumps(document)
    if not is_unicode(text):
        raise OptionError(
            f"{FILE_NAME} cannot hold the settings, because the name of a file or folder is not UTF-8: "
            f"{', '.join(printable(one) for one in _texts(settings) if not is_unicode(one))}. Rename it."
        )
    return text


def _texts(settings: Settings) -> Iterator[str]:
    for values in settings.given().values():
        for value in values.values():
            yield from (one for one in (value if isinstance(value, tuple) else (value,)) if isinstance(one, str))


def _document(header: tuple[str, ...]) -> Any:
    import tomlkit

    document = tomlkit.document()
    for line in header:
        document.add(tomlkit.comment(line))
    document.add(tomlkit.nl())
    return document


def _to_folder(declared: Field, value: Any, folder: Path) -> Any:
    if isinstance(value, tuple):
        return list(value)
    path = declared.path_in(value)
    if not path:
        return value
    shown, real = os.path.abspath(path), os.path.realpath(path)
    shown = shown if os.path.realpath(shown) == real else real
    base = os.path.realpath(folder)
    is_on_one_drive = os.path.splitdrive(shown)[0] == os.path.splitdrive(base)[0]
    relative = os.path.relpath(shown, base) if is_on_one_drive else shown
    return declared.not_a_word(Path(relative).as_posix() + value[len(path) :])


def template() -> str:
    """Returns an `openneutron.toml` with every setting, its description and its default, as comments.

    A setting without a default has the form of its value in place of the default.
    """
    lines = [f"# {line}" for line in _HEADER]
    for section, kind in SECTIONS.items():
        lines += ["", f"[{section}]  # {kind.__doc__}"]
        for one in fields_of(section):
            lines += ["", *(f"# {line}" for line in _wrapped(one)), f"# {one.name} = {_literal(one)}"]
    return "\n".join(lines) + "\n"


def _wrapped(declared: Field) -> list[str]:
    import textwrap

    choices = f" One of {', '.join(declared.choices)}." if declared.choices else ""
    return textwrap.wrap(declared.help.replace("--", "").replace(" Repeatable.", "") + choices, 100)


_FORMS = {
    "str": '"{}"', "int": "NUMBER", "float": "NUMBER", "tuple[float, ...]": "[NUMBER, ...]",
    "tuple[str, ...]": '["{}", ...]',
}  # fmt: skip


def _literal(declared: Field) -> str:
    """Returns the default of a setting as TOML; the form of its value, if it has none."""
    import tomlkit

    if declared.default in (None, ()):
        return f"{_FORMS[declared.kind].format(declared.metavar or 'TEXT')}  (not set)"
    value = list(declared.default) if isinstance(declared.default, tuple) else declared.default
    return str(tomlkit.item(value).as_string())

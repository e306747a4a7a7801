"""The options of a package."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Final, TypedDict, cast

from openneutron.core.options import check_option_names
from openneutron.errors import OptionError
from openneutron.settings.declaration import PackageSettings
from openneutron.settings.package_names import check_name, check_section

__all__ = ["PackageOptions", "with_defaults"]


class PackageOptions(TypedDict, total=False):
    """The options of a package, all of which may be left out."""

    name: str
    """The prefix of files, macros, functions and arrays, an identifier of C. By default "model"."""
    samples: Iterable[Any] | None
    """The inputs of the test vectors, in the forms that `HostProgram.run` takes; floats are quantized where the program
    takes int8. By default None, which stands for random inputs."""
    vectors: int | str | os.PathLike[str]
    """The number of random test vectors, or a .npz file with the inputs and outputs of vectors. By default 3."""
    tolerance: float
    """The largest difference of an output that passes on the board, in LSBs. By default 1."""
    section: str | None
    """The section of the linker script for the array of the program. By default that of constants (None)."""
    array: str
    """"c", "incbin" (assembler source that includes the file), or "auto", the default: "incbin" for large arrays."""


_DEFAULTS: Final = cast(PackageOptions, {**asdict(PackageSettings()), "samples": None, "vectors": 3})
"""The options that `openneutron package` has, too, have the defaults of its settings."""


def with_defaults(options: PackageOptions) -> PackageOptions:
    """Returns all options, those left out with their defaults. Raises `OptionError` for an unknown or a wrong one.

    `array` is checked where the array is written.
    """
    check_option_names("package", options, _DEFAULTS)
    complete: PackageOptions = {**_DEFAULTS, **options}
    check_name(complete["name"])
    _check_values(complete["vectors"], complete["tolerance"])
    check_section(complete["section"])
    if not isinstance(complete["samples"], Iterable | None):
        found = type(complete["samples"]).__name__
        raise OptionError(f"'samples' is a list of inputs of the program, not {found}. Give a list, or leave it out.")
    return complete


def _check_values(vectors: object, tolerance: object) -> None:
    is_count = isinstance(vectors, int) and not isinstance(vectors, bool) and vectors > 0
    if not is_count and not isinstance(vectors, (str, os.PathLike)):
        raise OptionError(f"'vectors' is a positive number of test vectors, or a .npz file, not {vectors!r}.")
    is_number = isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool)
    if not is_number or not 0 <= tolerance < float("inf"):  # type: ignore[operator]
        raise OptionError(f"'tolerance' is a number of LSBs from 0, not {tolerance!r}.")

"""Parts of error messages. Imports no other module of the package."""

from __future__ import annotations

import difflib
import os
import reprlib
import shlex
from collections.abc import Iterable

__all__ = [
    "as_argument", "as_sentence", "did_you_mean", "first_line", "is_unicode", "listed", "near_matches", "printable",
    "shown",
]  # fmt: skip


def first_line(error: BaseException) -> str:
    """Returns the first non-empty line of an error's message."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), "no message")


def as_sentence(message: object) -> str:
    """Returns the text of a message that another sentence follows: with a period, unless it ends with a mark."""
    text = str(message).rstrip()
    return text if text.endswith((".", "!", "?")) else f"{text}."


def as_argument(path: str | os.PathLike[str]) -> str:
    """Returns a path as an argument of a command in a shell: in quotes if it has spaces or other special characters."""
    text = os.fspath(path)
    if os.name != "nt":
        return shlex.quote(text)
    from subprocess import list2cmdline  # not needed, and slow to import, on other systems

    return list2cmdline([text])


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns " Did you mean 'a' or 'b'?" with the names in `known` that resemble `name`; empty if there are none."""
    near = difflib.get_close_matches(name, sorted(known), n=3)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def near_matches(name: str, known: Iterable[str]) -> str:
    """Returns " Near matches: a, b." with up to five names in `known` that resemble `name`; empty if there are none."""
    near = difflib.get_close_matches(name, sorted(known), n=5, cutoff=0.5)
    return f" Near matches: {', '.join(near)}." if near else ""


def is_unicode(text: str) -> bool:
    """Whether a text can be written in UTF-8. Names of files may have other bytes, which Python holds as surrogates."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def printable(text: str) -> str:
    """Returns a text that can be written in UTF-8: bytes of a file's name that are not UTF-8 become "\\xff"."""
    return text if is_unicode(text) else text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def listed(names: Iterable[str], limit: int = 8) -> str:
    """Returns the first `limit` of `names`, separated by commas, and the number of the others."""
    names = list(names)
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} other{'s' * (rest > 1)}" if rest > 0 else "")


def shown(value: object) -> str:
    """Returns a value as Python writes it, shortened where it is long."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "an integer of thousands of digits"

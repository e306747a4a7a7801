"""Reads the kernel selections that NXP's converter writes: C source for the firmware."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from openneutron.errors import FormatError

__all__ = ["kernel_selection_in", "kernel_selection_text"]

LARGEST_BYTES = 4 << 20
"""The largest size of a kernel selection. A real one has a few lines for each kernel of the NPU's library."""

# A string without end takes the rest of its line, and a comment without end the rest of the text. Otherwise, each quote
# and each "/*" would be searched for its end again, which takes quadratic time.
_COMMENT_OR_STRING = re.compile(r'"(?:\\.|[^"\\\n])*+"?|//[^\n]*|/\*.*?(?:\*/|\Z)', re.DOTALL)
_TRIGRAPH = re.compile(r"\?\?[=/'()!<>-]")
_FILE_DIRECTIVE = re.compile(r"^[ \t]*(?:#|%:)[ \t]*(?:include|include_next|import|embed)\b(.*)$", re.MULTILINE)
_FILE_NAME = re.compile(r'\s*(?:"([^"\n]+)"|<([^>\n]+)>)\s*')


def kernel_selection_in(path: Path) -> str | None:
    """Returns the text of a file; None if there is none. Raises `FormatError` as `kernel_selection_text` does.

    A symbolic link is refused, because it may lead out of the folder of the converter's run.
    """
    if path.is_symlink():
        raise FormatError(f"The kernel selection '{path.name}' is a symbolic link. Give the file itself.")
    if not path.exists():
        return None
    with path.open("rb") as file:
        return kernel_selection_text(file.read(LARGEST_BYTES + 1), path.name)


def kernel_selection_text(data: bytes | str, what: str = "the kernel selection") -> str:
    """Returns a kernel selection as text. Errors call it `what`.

    The firmware compiles the text as C source. Raises `FormatError` for a text that is empty, larger than 4 MiB or not
    UTF-8; and, with the line, for a control character, a comment without end, and an included name that may lead out of
    the compiler's include paths, such as an absolute path or one with "..".
    """
    raw = data.encode(errors="surrogatepass") if isinstance(data, str) else data
    if not raw.strip() or len(raw) > LARGEST_BYTES:
        size = "empty" if not raw.strip() else f"larger than {LARGEST_BYTES:,} bytes"
        raise FormatError(f"{what} is {size}. Compile the program again.")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{what}, byte {error.start}: expected UTF-8 text of C. Compile the program again."
        ) from error
    for match in re.finditer(r"[^\t\n\r\f\x20-\x7e\u00a0-\U0010ffff]", text):
        raise FormatError(
            f"{what}, line {_line(text, match.start())}: a control character {match[0]!r} in C source. Compile the "
            "program again."
        )
    joined = re.sub(r"\\\r?\n", "", text)
    code, literals = _without_comments(joined)
    for pattern, found in (
        (r"/\*", "a comment that does not end"),
        (r"'", "a character constant, or a quote without end"),  # compilers may take the text after it for a comment
        (_TRIGRAPH, "a trigraph"),
    ):
        if wrong := re.search(pattern, code if pattern is _TRIGRAPH else literals):
            line = _line(code, wrong.start())
            raise FormatError(f"{what}, line {line}: {found} in C source. Compile the program again.")
    for directive in _FILE_DIRECTIVE.finditer(code):
        name = _FILE_NAME.fullmatch(directive[1])
        if name is None or not _stays_in_folder(name[1] or name[2]):
            raise FormatError(
                f"{what}, line {_line(code, directive.start())}: expected the name of a header inside of the include "
                f"folders, found {directive[1].strip()!r}."
            )
    return text


def _without_comments(text: str) -> tuple[str, str]:
    """Returns C source without comments, and this source with strings of "x". Lines keep their numbers.

    A comment without end stays, and so does a string without end, as a quote.
    """

    def code(found: re.Match[str]) -> str:
        token = found[0]
        is_comment = token.startswith("//") or (token.startswith("/*") and token.endswith("*/") and len(token) >= 4)
        return " " + "\n" * token.count("\n") if is_comment else token

    def literal(found: re.Match[str]) -> str:
        token = found[0]
        if token.startswith("/*"):
            return token
        return "x" * len(token) if len(token) > 1 and token.endswith('"') else "'" * len(token)

    without = _COMMENT_OR_STRING.sub(code, text)
    return without, _COMMENT_OR_STRING.sub(literal, without)


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _stays_in_folder(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and not set(name) & set("\\:")

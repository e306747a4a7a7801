"""Kernel selections of the converter: valid ones are returned unchanged, others raise an error that names the line."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import pytest

from openneutron.errors import FormatError
from openneutron.formats.kernel_selection import LARGEST_BYTES, kernel_selection_in, kernel_selection_text

RIGHT = (
    "// kernels of 12 bytes\n",
    '#include "neutron/kernels.h"\n#include <stdint.h> // "../x"\nconst char *name = "/* ../../ */";\n',
    '/* #include "../../etc/passwd" */\r\nint kernels[] = {\n  1,\n};\n',
    "int größe;\n",
)


@pytest.mark.parametrize("text", RIGHT)
def test_right_sources_come_back(text: str) -> None:
    assert kernel_selection_text(text.encode()) == text
    assert kernel_selection_text(text) == text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"x" * (LARGEST_BYTES + 1), "larger than"),
        (b"int a;\xff\n", "byte 6: expected UTF-8"),
        (b"int a;\nint\0b;\n", "line 2: a control character"),
        (b"int a;\n\x1b[31m\n", "line 2: a control character"),
        (b"int a; /* open\n", "line 1: a comment that does not end"),
        (b'int a;\n#include "../secret.h"\n', "line 2: expected the name of a header"),
        (b'#include "a/../../secret.h"\n', "line 1"),
        (b"#include </etc/passwd>\n", "line 1"),
        (b'#  include "C:/secret.h"\n', "line 1"),
        (b'#include "..\\\\secret.h"\n', "line 1"),
        (b'%:include "../secret.h"\n', "line 1"),
        (b'#inc\\\nlude "../secret.h"\n', "line 1"),
        (b'const int x[] = {\n#embed "/etc/passwd"\n};\n', "line 2"),
        (b"#include MACRO\n", "line 1"),
        (b'#include "open.h\n', "line 1: a character constant, or a quote without end"),
        (b"int a;\nchar q = '\"', *s = \"/*\";\n#include \"../secret.h\"\nchar *t = \"*/\";\n", "line 2: a character"),
        (b'#inc??/\nlude "../secret.h"\n', "line 1: a trigraph"),
        (b'??=include "../secret.h"\n', "line 1: a trigraph"),
        (b"/* a\n b */ int a;\n#include MACRO\n", "line 3"),
        (b"/*/ open\n", "line 1: a comment that does not end"),
        (b'char *a = "/*";\n#include "../secret.h"\nchar *b = "*/";\n', "line 2"),
        ("int \ud800;\n", "expected UTF-8"),
    ],
)
def test_wrong_sources_are_refused(data: bytes | str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        kernel_selection_text(data, "selection.c")


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "selection.c"
    assert kernel_selection_in(path) is None
    path.write_text(RIGHT[0])
    assert kernel_selection_in(path) == RIGHT[0]
    link = tmp_path / "link.c"
    link.symlink_to(path)
    with pytest.raises(FormatError, match="symbolic link"):
        kernel_selection_in(link)


@pytest.mark.parametrize("piece", ["/* ", '"\\"', '"', "/*", "// ", "#include ", "\\\n", "'", "??", "# "])
def test_time_is_linear(piece: str) -> None:
    """Quadratic time would take minutes."""
    begin = time.process_time()
    with suppress(FormatError):
        kernel_selection_text("x" + piece * (LARGEST_BYTES // 4 // len(piece)))
    assert time.process_time() - begin < 10

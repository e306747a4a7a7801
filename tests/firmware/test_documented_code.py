"""The C and C++ code in docs/firmware.md and docs/board.md compiles without warnings, beside a package."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.firmware_models import program

PAGES = ("firmware.md", "board.md")
DOCS = Path(__file__).parents[2] / "docs"
_BLOCK = re.compile(r"^```(c|cpp|c\+\+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DRIVER = """#pragma once
typedef enum NeutronError { ENONE = 0 } NeutronError;
#ifdef __cplusplus
extern "C"
#endif
NeutronError neutronInit(void);
"""
"""The declarations of NXP's NeutronDriver.h that the code uses. The driver itself is not available here."""


def blocks_of(page: str) -> list[tuple[str, str]]:
    """Returns the language and the text of each block of C or C++ of a page."""
    return [(found[1], found[2]) for found in _BLOCK.finditer((DOCS / page).read_text())]


def test_the_pages_have_code_in_known_languages() -> None:
    assert [language for page in PAGES for language, _ in blocks_of(page)] == ["cpp"]
    names = {name for page in PAGES for name in re.findall(r"^```(\S+)", (DOCS / page).read_text(), re.MULTILINE)}
    assert names <= {"cpp"}, "a block in another language is not compiled by this test"


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs c++")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)])
def test_the_code_compiles(page: str, tmp_path: Path) -> None:
    spec = importlib.util.find_spec("executorch")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = spec.submodule_search_locations[0]
    program("int8").package(tmp_path / "kws", name="kws")
    (tmp_path / "NeutronDriver.h").write_text(DRIVER)
    includes = ("-I", "kws", "-I", ".", "-isystem", f"{root}/include", "-isystem", f"{Path(root).parent}")
    c10 = f"{root}/include/executorch/runtime/core/portable_type/c10"
    for number, (_, text) in enumerate(blocks_of(page)):
        (tmp_path / f"block_{number}.cpp").write_text(text)
        command = (
            "c++", "-std=c++17", *STRICT, "-fsyntax-only",
            "-DC10_USING_CUSTOM_GENERATED_MACROS", *includes, "-isystem", c10, f"block_{number}.cpp",
        )  # fmt: skip
        found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
        assert found.returncode == 0, found.stdout + found.stderr


STRICT = (
    "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wsign-conversion", "-Wshadow", "-Wcast-align", "-Wcast-qual",
    "-Wundef", "-Wdouble-promotion", "-Wformat=2", "-Werror",
)  # fmt: skip
COMPILERS = [
    ("cc", "-std=c11", "one.c"),
    ("c++", "-std=c++17", "one.cpp"),
    ("arm-none-eabi-gcc", "-std=c11", "one.c"),
]


@pytest.mark.parametrize("name", ["constants", "int8", "segmentation", "two"])
@pytest.mark.parametrize("compiler", COMPILERS, ids=[one[0] for one in COMPILERS])
def test_each_header_compiles_alone_and_twice(name: str, compiler: tuple[str, str, str], tmp_path: Path) -> None:
    command, standard, file = compiler
    if shutil.which(command) is None:
        pytest.skip(f"needs {command}")
    program(name).package(tmp_path / "package", name=name)
    for header in (f"{name}.h", f"{name}_config.h", f"{name}_io.h", "test_vectors.h"):
        (tmp_path / file).write_text(f'#include "{header}"\n' * 2)
        found = subprocess.run(
            (command, standard, *STRICT, "-fsyntax-only", "-I", "package", file),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert found.returncode == 0, found.stdout + found.stderr

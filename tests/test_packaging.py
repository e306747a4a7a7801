"""The built package: version, search path of the native module, build without a compiler."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import executorch
import pytest

import openneutron
from openneutron.runtime import native

ROOT = Path(__file__).parents[1]
SITE_PACKAGES = Path(executorch.__path__[0]).parent
IS_INSTALLED = Path(openneutron.__file__).parents[1] == SITE_PACKAGES
BUILD_SDIST = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
NO_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}


def test_the_version_is_written_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project
    assert project["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", openneutron.__version__)
    if IS_INSTALLED:
        assert importlib.metadata.version("openneutron") == openneutron.__version__


@pytest.mark.skipif(not IS_INSTALLED, reason="tests run on the sources: the native module is a copy from elsewhere")
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_the_native_module_searches_no_folder_of_the_machine_that_built_it() -> None:
    file = native.native_module().__file__
    assert file is not None
    table = subprocess.run(["readelf", "-d", file], check=True, capture_output=True, text=True).stdout
    assert re.findall(r"\((?:RUNPATH|RPATH)\).*\[(.*)\]", table) == ["$ORIGIN/../../executorch/lib"]


def wheel_without_compiler(source: Path, folder: Path, native: str | None) -> subprocess.CompletedProcess[str]:
    """The outcome of `pip wheel -v` without a compiler. `native` is the value of OPENNEUTRON_NATIVE."""
    environment = {key: value for key, value in os.environ.items() if key != "OPENNEUTRON_NATIVE"} | NO_COMPILER
    if native is not None:
        environment["OPENNEUTRON_NATIVE"] = native
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-cache-dir",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(folder),
    ]
    return subprocess.run(
        [*command, "-C", f"build-dir={folder / 'build'}", str(source)],
        check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


@pytest.mark.slow
def test_the_source_distribution_builds_without_a_compiler(tmp_path: Path) -> None:
    pytest.importorskip("scikit_build_core")
    subprocess.run([sys.executable, "-c", BUILD_SDIST, str(tmp_path)], check=True, capture_output=True, cwd=ROOT)
    (archive,) = tmp_path.glob("openneutron-*.tar.gz")
    shutil.unpack_archive(archive, tmp_path, filter="data")
    source = tmp_path / f"openneutron-{openneutron.__version__}"
    tracked = {
        path.relative_to(ROOT) for folder in ("csrc", "src", "tests") for path in (ROOT / folder).rglob("*.[chp]*")
    }
    missing = [
        path for path in tracked if path.suffix in (".cpp", ".h", ".py", ".pyi") and not (source / path).is_file()
    ]
    assert missing == []

    fallen_back = wheel_without_compiler(source, tmp_path / "auto", None)
    assert fallen_back.returncode == 0, fallen_back.stdout
    assert "so the native module is left out" in fallen_back.stdout
    (wheel,) = (tmp_path / "auto").glob("*.whl")
    assert wheel.name == f"openneutron-{openneutron.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
    assert "openneutron/py.typed" in names
    assert [name for name in names if re.search(r"\.(so|pyd|dylib)$", name)] == []

    assert wheel_without_compiler(source, tmp_path / "required", "1").returncode != 0
    left_out = wheel_without_compiler(source, tmp_path / "off", "0")
    assert left_out.returncode == 0, left_out.stdout
    assert "CMake" not in left_out.stdout
    assert "built without the native module" in left_out.stdout

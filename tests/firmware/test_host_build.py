"""Packages built on this machine with CMake: their outputs equal those of `run`, in pools of exactly their sizes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.board_models import as_codes, as_floats
from tests.firmware_models import IMAGE, PROGRAMS, program

from openneutron.accuracy.board_tensors import board_outputs
from openneutron.accuracy.validate import load_program

_LIBRARY = Path(sysconfig.get_config_var("LIBDIR") or "", sysconfig.get_config_var("LDLIBRARY") or "missing")
_MISSING = [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.skipif(bool(_MISSING), reason=f"needs {' and '.join(_MISSING)}"),
    pytest.mark.skipif(not _LIBRARY.exists(), reason="needs Python's library, to start Python in a program"),
]

STRICT = "-Wconversion -Wsign-conversion -Wshadow -Wcast-align -Wcast-qual -Wundef -Wdouble-promotion -Wformat=2"
"""Warnings beside those of the package's CMakeLists.txt, in which warnings are errors."""
SMALL = {"method": "METHOD_POOL_BYTES", "planned": "PLANNED_0_BYTES", "temporary": "TEMPORARY_POOL_BYTES"}
"""Pools that the variants of the program "floats" have 16 bytes less of."""


@dataclass(frozen=True)
class Tree:
    """Packages in one CMake project, which is configured once."""

    folder: Path

    def run(self, name: str) -> tuple[int, str]:
        """Builds and runs the test of a package. Returns its exit code and what it prints."""
        target = f"{name}_test"
        built = subprocess.run(
            ["cmake", "--build", "build", "--target", target],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert built.returncode == 0, built.stdout + built.stderr
        ran = subprocess.run([self.folder / "build" / name / target], capture_output=True, text=True, check=False)
        return ran.returncode, ran.stdout

    def header(self, name: str) -> str:
        return (self.folder / name / f"{name}_config.h").read_text()


def _selected(request: pytest.FixtureRequest) -> list[str]:
    """Returns the names of the packages that the selected tests use."""
    used = [item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")]
    return [name for name in PROGRAMS if name in used]


def _near_outputs(path: Path) -> Path:
    """Writes a vector of the program "outputs" with another zero, another NaN, and another last bit of float16."""
    image = torch.randn(IMAGE, generator=torch.Generator().manual_seed(0))
    view, constant, half = (one.numpy() for one in program("outputs").run(image))
    other = (constant.view(np.uint32) ^ np.array([0, 1 << 31, 1], np.uint32)).view(np.float32)
    arrays: dict[str, Any] = {"input0": image.numpy(), "output0": view, "output1": other}
    arrays["output2"] = (half.view(np.uint16) ^ 1).view(np.float16)
    np.savez(path, **{name: array[None] for name, array in arrays.items()})
    return path


def _outputs_one_code_off(path: Path) -> Path:
    """Writes a vector of the program "floats" whose outputs are dequantized from the codes beside the right ones."""
    made = program("floats")
    image = torch.randn(IMAGE, generator=torch.Generator().manual_seed(0))
    (output,) = board_outputs(load_program(made))
    values = made.run(image)
    right = values.numpy() if isinstance(values, torch.Tensor) else values[0].numpy()
    assert output.scale is not None
    codes = as_codes(output, right).astype(np.int64)
    near = as_floats(output, np.where(codes == 127, 126, codes + 1))
    assert float((np.abs(near.astype(np.float64) - right) / output.scale).max()) > 1
    np.savez(path, input0=image.numpy()[None], output0=near[None])
    return path


@pytest.fixture(scope="session")
def tree(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    folder = tmp_path_factory.mktemp("firmware")
    lines = ["cmake_minimum_required(VERSION 3.22)", "project(all C CXX ASM)", "enable_testing()"]
    for name in _selected(request):
        array = "incbin" if name == "two" else "auto"
        program(name).package(folder / name, name=name, array=array)
        lines.append(f"add_subdirectory({name})")
    for pool, macro in SMALL.items():
        name = f"small_{pool}"
        program("floats").package(folder / name, name=name)
        text = (folder / name / f"{name}_config.h").read_text()
        found = re.search(rf"{macro} (\d+)u", text)
        assert found is not None
        lines.append(f"add_subdirectory({name})")
        bytes_left = int(found[1]) - 16
        lines.append(f"target_compile_definitions({name}_test PRIVATE {name.upper()}_{macro}={bytes_left}u)")
    if "constants" in _selected(request):
        program("constants").package(folder / "altered", name="altered")
        header = folder / "altered" / "test_vectors.h"
        text = header.read_text()
        assert "INT64_C(3)" in text
        header.write_text(text.replace("INT64_C(3)", "INT64_C(4)"))
        lines.append("add_subdirectory(altered)")
    if "floats" in _selected(request):
        vectors = _outputs_one_code_off(folder / "one_off.npz")
        for name, tolerance in {"one_off": 1, "less_off": 0.9999}.items():
            program("floats").package(folder / name, name=name, vectors=vectors, tolerance=tolerance)
            lines.append(f"add_subdirectory({name})")
    if "outputs" in _selected(request):
        program("outputs").package(folder / "near", name="near", vectors=_near_outputs(folder / "vectors.npz"))
        lines.append("add_subdirectory(near)")
    (folder / "CMakeLists.txt").write_text("\n".join(lines) + "\n")
    flags = [f"-DCMAKE_C_FLAGS={STRICT}", f"-DCMAKE_CXX_FLAGS={STRICT} -Wold-style-cast"]
    command = ["cmake", "-S", ".", "-B", "build", "-DCMAKE_BUILD_TYPE=Debug", *flags]
    made = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    return Tree(folder)


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_outputs_of_a_package_equal_the_host_bit_for_bit(tree: Tree, name: str) -> None:
    code, text = tree.run(name)
    assert code == 0, text
    lines = text.splitlines()
    is_portable = lines[0].startswith("The delegates of this program hold TFLite models, not microcode")
    assert is_portable is (name != "cpu")
    assert lines[-1] == f"PASS: {name}, 3 vectors, largest difference 0 LSB, allowed 1 LSB"
    used, size = map(int, re.findall(r"method pool: (\d+) of (\d+)", text)[0])
    assert size - 16 < used <= size


@pytest.mark.parametrize("name", ["outputs"])
def test_outputs_are_compared_as_numbers(tree: Tree, name: str) -> None:
    code, text = tree.run("near")
    found = re.search(r"^PASS: near, 1 vectors, largest difference ([\d.e-]+) LSB", text, re.MULTILINE)
    assert code == 0, text
    assert found is not None, text
    assert 0 < float(found[1]) < 1


@pytest.mark.parametrize("name", ["floats"])
def test_float_outputs_may_differ_by_a_code_and_rounding(tree: Tree, name: str) -> None:
    code, text = tree.run("one_off")
    assert code == 0, text
    assert text.splitlines()[-1] == "PASS: one_off, 1 vectors, largest difference 1 LSB, allowed 1 LSB"
    code, text = tree.run("less_off")
    assert code == 1
    assert text.splitlines()[-1] == "FAIL: less_off, 1 vectors, largest difference 1 LSB, allowed 0.9999 LSB"


@pytest.mark.parametrize("name", ["constants"])
def test_outputs_that_are_constants_are_compared(tree: Tree, name: str) -> None:
    code, text = tree.run("altered")
    assert code == 1
    assert "output 2 is not the constant that it is on the host" in text
    assert "FAIL: altered, 3 vectors, largest difference inf LSB" in text


@pytest.mark.parametrize("pool", sorted(SMALL))
def test_a_pool_that_is_16_bytes_smaller_is_named(tree: Tree, pool: str) -> None:
    code, text = tree.run(f"small_{pool}")
    assert code == 1
    # With less temporary memory, the runtime searches for kernels in the method pool, which has no room for that.
    assert re.search(rf"FAIL: .*SMALL_{pool.upper()}_{SMALL[pool]} is \d+.* too small", text), text
    request = rf"^SMALL_{pool.upper()}_METHOD_POOL_BYTES is \d+: \d+ bytes are in use,"
    assert (re.search(request, text, re.MULTILINE) is None) is (pool == "planned"), text


def test_ctest_runs_the_test(tree: Tree) -> None:
    tree.run("small_method")
    found = subprocess.run(
        ["ctest", "--test-dir", "build", "-R", "^small_method$"],
        cwd=tree.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode != 0
    assert "0% tests passed" in found.stdout

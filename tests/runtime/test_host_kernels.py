"""The host runtime's own quantize and dequantize, compared with ExecuTorch's kernels.

The host runtime has no own kernel for tensors of rank 7, so a program with such tensors runs ExecuTorch's.
"""

from __future__ import annotations

import functools
import platform
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import executorch.kernels.quantized  # noqa: F401  exir needs the operators' out variants
import numpy as np
import pytest
import torch
from executorch.exir import to_edge
from executorch.extension.pybindings import _C
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from openneutron.runtime import HostProgram
from openneutron.runtime.native import native_module

Shape = tuple[int, ...]
Grid = tuple[float, int, int, int]  # scale, zero point, quant_min, quant_max
COUNT = 67  # vectors of all widths, and a rest
SHAPES: list[Shape] = [(COUNT,), (COUNT, 1), (3, 5, 7), (2, 3, 5, 7), (2, 1, 3, 5, 7), (1, 2, 3, 1, 5, 7)]
FORMATS = [*((shape, False) for shape in SHAPES), ((2, 3, 5, 7), True)]
FALLBACK = (1, 1, 1, 1, 1, 1, COUNT)

# Placeholder values in an exported program. Each occurs once, so one export serves all values.
STAND_INS: Grid = 0.0123456789, -57, -113, 109

only_where_the_host_has_kernels = pytest.mark.skipif(
    platform.machine() not in {"x86_64", "AMD64"}, reason="ExecuTorch's kernels are vectorized on this machine"
)


@functools.cache
def template(operator: str, shape: Shape, channels_last: bool) -> bytes:
    call = getattr(torch.ops.quantized_decomposed, operator)

    class Program(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return call(x, *STAND_INS, torch.int8)

    x = torch.zeros(shape, dtype=torch.float32 if operator == "quantize_per_tensor" else torch.int8)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    return bytes(to_edge(torch.export.export(Program(), (x,))).to_executorch().buffer)


def pte(operator: str, shape: Shape, grid: Grid, *, channels_last: bool = False) -> bytes:
    data = template(operator, shape, channels_last)
    words = [(data.index(word), new) for word, new in zip(packed(STAND_INS), packed(grid), strict=True)]
    assert [data.count(word) for word in packed(STAND_INS)] == [1] * len(words)
    for place, word in words:
        data = data[:place] + word + data[place + len(word) :]
    return data


def packed(grid: Grid) -> list[bytes]:
    return [struct.pack("<d", grid[0]), *(struct.pack("<q", value) for value in grid[1:])]


def run(operator: str, x: torch.Tensor, grid: Grid, *, channels_last: bool = False) -> torch.Tensor:
    data = pte(operator, tuple(x.shape), grid, channels_last=channels_last)
    result = HostProgram.from_bytes(data).run(x)
    assert isinstance(result, torch.Tensor)
    return result


def bits(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().view({1: torch.uint8, 4: torch.int32}[tensor.element_size()]).numpy()


def assert_same(operator: str, x: torch.Tensor, grid: Grid) -> None:
    own, theirs = run(operator, x, grid), run(operator, x.reshape(FALLBACK), grid)
    np.testing.assert_array_equal(bits(own), bits(theirs).reshape(x.shape))


SPECIAL = [0.0, -0.0, float("nan"), float("inf"), float("-inf"), 1e-45, -1e-45, 3e38, -3e38, 2.0**63, -(2.0**63)]
SPECIAL += [2.0**62, 2.0**31, -(2.0**31), 2.0**24 + 2, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 127.5, 128.0, -128.5, -129.0]
scales = st.one_of(
    st.floats(1e-6, 1e3),
    st.floats(min_value=0, allow_infinity=False),  # also values that become 0 or infinity in float
    st.sampled_from([2.0**-7, 0.1, 1.0, -0.25, 1e-300, 1e300, 1e-42]),
)
zero_points = st.one_of(st.integers(-128, 127), st.integers(-(2**63), 2**63 - 1))
lows, highs = st.one_of(st.just(-128), st.integers(-128, 127)), st.one_of(st.just(127), st.integers(-300, 127))


@st.composite
def numbers(draw: st.DrawFn, scale: float) -> torch.Tensor:
    steps = st.integers(-600, 600).map(lambda half: np.float32(half / 2 * scale))  # including ties
    anything = st.floats(width=32)
    with np.errstate(all="ignore"):
        values = draw(hnp.arrays(np.float32, COUNT, elements=st.one_of(steps, anything, st.sampled_from(SPECIAL))))
    return torch.from_numpy(values)


class TestEqualToExecuTorchs:
    @settings(max_examples=150, deadline=None)
    @given(st.data(), scales, zero_points, lows, highs)
    def test_quantize(self, data: st.DataObject, scale: float, zero_point: int, low: int, high: int) -> None:
        assert_same("quantize_per_tensor", data.draw(numbers(scale)), (scale, zero_point, low, high))

    @pytest.mark.parametrize("scale", [2.0**-7, 1.0, 0.1, -0.25, 1e-300, 1e300])
    @pytest.mark.parametrize("zero_point", [0, -128, 127, 2**24 + 1, 2**31, -(2**31), 2**40 + 3])
    def test_quantize_special_values(self, scale: float, zero_point: int) -> None:
        values = np.resize(np.array(SPECIAL, np.float32), COUNT)
        with np.errstate(over="ignore", invalid="ignore"):
            for x in (values, values * np.float32(scale)):
                assert_same("quantize_per_tensor", torch.from_numpy(x), (scale, zero_point, -128, 127))

    @settings(max_examples=100, deadline=None)
    @given(hnp.arrays(np.int8, COUNT), scales, zero_points, lows, highs)
    @example(np.arange(-33, 34, dtype=np.int8), 0.1, 2**31 - 1, -128, 127)
    @example(np.arange(-33, 34, dtype=np.int8), 0.1, -(2**31), -128, 127)
    def test_dequantize(self, x: Any, scale: float, zero_point: int, low: int, high: int) -> None:
        low, high = sorted((low, high))
        assert_same("dequantize_per_tensor", torch.from_numpy(x), (scale, zero_point, low, high))

    def test_every_integer_dequantized(self) -> None:
        for first in range(-128, 128, COUNT):
            integers = torch.arange(first, first + COUNT).to(torch.int8)
            assert_same("dequantize_per_tensor", integers, (0.1, 3, -128, 127))


class TestEqualToTorchs:
    # Scales that float32 represents exactly: torch inverts a double, ExecuTorch a float.
    @pytest.mark.parametrize("scale", [2.0**-7, float(np.float32(0.1)), float(np.float32(0.0173)), 3.0])
    @pytest.mark.parametrize("limits", [(0, -127, 127), (-128, -128, 127), (19, -128, 100)])
    @pytest.mark.parametrize(("shape", "channels_last"), FORMATS)
    def test_equals_torch(self, scale: float, limits: tuple[int, int, int], shape: Shape, channels_last: bool) -> None:
        grid: Grid = (scale, *limits)
        x = torch.from_numpy(np.random.default_rng(0).normal(0, 60 * scale, shape).astype(np.float32))
        expected = torch.ops.quantized_decomposed.quantize_per_tensor(x, *grid, torch.int8)
        integers = run("quantize_per_tensor", x, grid, channels_last=channels_last)
        assert torch.equal(integers, expected)
        expected = torch.ops.quantized_decomposed.dequantize_per_tensor(integers, *grid, torch.int8)
        assert torch.equal(run("dequantize_per_tensor", integers, grid, channels_last=channels_last), expected)

    @only_where_the_host_has_kernels
    def test_nan_and_large_values_become_the_lowest_code_as_in_executorch(self) -> None:
        x = torch.tensor([float("nan"), float("inf"), float("-inf"), 3e38, 1e9] + [0.0] * (COUNT - 5))
        assert run("quantize_per_tensor", x, (1.0, 5, -100, 100))[:6].tolist() == [-100, -100, -100, -100, 100, 5]

    def test_inputs_that_autograd_follows(self) -> None:
        x = torch.linspace(-3, 3, COUNT)
        expected = run("quantize_per_tensor", x, (0.25, 1, -128, 127))
        for followed in (x.clone().requires_grad_(), torch.nn.Parameter(x), torch.nn.Parameter(x) * 1):
            assert torch.equal(run("quantize_per_tensor", followed, (0.25, 1, -128, 127)), expected)

    def test_a_smaller_input_of_a_dynamic_program(self) -> None:
        class Program(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> Any:
                y = torch.ops.quantized_decomposed.quantize_per_tensor(x, 0.5, 3, -128, 127, torch.int8)
                return torch.ops.quantized_decomposed.dequantize_per_tensor(y, 0.5, 3, -128, 127, torch.int8)

        rows = {"x": {0: torch.export.Dim("rows", min=2, max=9)}}
        exported = torch.export.export(Program(), (torch.zeros(5, 7),), dynamic_shapes=rows)
        program = HostProgram.from_bytes(bytes(to_edge(exported).to_executorch().buffer))
        for count in (9, 2, 4):
            x = torch.arange(count * 7, dtype=torch.float32).reshape(count, 7) / 2
            assert torch.equal(program._session.call([x])[0], x)


# Inputs that end the process in ExecuTorch's kernels make a run of the host's kernels fail, which shows which one ran.
WRONG: dict[str, Grid] = {"quantize_per_tensor": (1.0, 0, -129, 127), "dequantize_per_tensor": (1.0, 0, 5, 4)}
DTYPES = {"quantize_per_tensor": torch.float32, "dequantize_per_tensor": torch.int8}


@only_where_the_host_has_kernels
class TestWhichKernelRuns:
    @pytest.mark.parametrize(("shape", "channels_last"), FORMATS)
    @pytest.mark.parametrize("operator", WRONG)
    def test_the_host_runs_its_own_kernels(self, operator: str, shape: Shape, channels_last: bool) -> None:
        x = torch.zeros(shape, dtype=DTYPES[operator])
        native_module()
        data = pte(operator, shape, WRONG[operator], channels_last=channels_last)
        method = _C._load_program_from_buffer(data).load_method("forward")
        with pytest.raises(RuntimeError, match="method->execute"):
            method.call([x])

    @pytest.mark.parametrize("operator", WRONG)
    def test_executorch_kernels_run_for_other_ranks(self, operator: str, tmp_path: Path) -> None:
        assert self.process(tmp_path, operator, FALLBACK, "import openneutron.runtime").returncode < 0

    @pytest.mark.parametrize("first", ["import openneutron.runtime", "import executorch.kernels.quantized"])
    def test_the_host_runs_its_own_kernels_beside_the_export_kernels(self, first: str, tmp_path: Path) -> None:
        ended = self.process(tmp_path, "quantize_per_tensor", (COUNT,), first)
        assert ended.returncode == 1
        assert "RuntimeError" in ended.stderr
        assert "quant_min or quant_max is outside the range of int8" in ended.stderr

    def process(self, folder: Path, operator: str, shape: Shape, first: str) -> subprocess.CompletedProcess[str]:
        """Runs an invalid program in a process, and returns the outcome of the process. `first` is the first import.

        The process calls ExecuTorch's runtime, because `load` refuses the program.
        """
        file = folder / "wrong.pte"
        file.write_bytes(pte(operator, shape, WRONG[operator]))
        code = f"""
{first}
import sys, torch, executorch.kernels.quantized
from executorch.extension.pybindings import _C
from openneutron.runtime.native import native_module
native_module()
_C._load_program(sys.argv[1]).load_method("forward").call([torch.zeros({shape}, dtype={DTYPES[operator]})])
"""
        return subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=False)

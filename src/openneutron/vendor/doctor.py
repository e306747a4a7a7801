"""Checks the installed converter of the vendor step by step, and writes a text for bug reports."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from openneutron.compile_spec import CompileOptions
from openneutron.errors import OpenNeutronError
from openneutron.formats import tflite
from openneutron.formats.payload import PayloadHeader, microcode_header, parse
from openneutron.ir.graph import Graph, Op, QParams, Tensor
from openneutron.ir.kinds import CONV_2D
from openneutron.vendor import sdk
from openneutron.vendor.device import converter_flags, device_payload
from openneutron.vendor.profiling import kernels_of

__all__ = ["ConverterCheck", "check_converter"]

DEFAULT_TARGET = "imxrt700"
TIME_LIMIT_SECONDS = 120.0
PACKAGES = ("openneutron", "torch", "executorch", "torchao", "ai-edge-litert")


@dataclass(frozen=True)
class ConverterCheck:
    """The text of the report, and whether every check passed."""

    text: str
    passed: bool


def check_converter(flavor: str | None = None, target: str | None = None) -> ConverterCheck:
    """Converts a tiny model and checks the results step by step. Stops after the first step that fails."""
    machine = f"{platform.platform()}, Python {platform.python_version()}"
    lines = [f"OpenNeutron's check of the vendor's converter, on {machine}"]
    lines += [f"  {name} {_version(name)}" for name in PACKAGES]
    lines.append(f"  converters installed: {', '.join(map(str, sdk.installed())) or 'none'}")
    passed = True
    for name, step in _steps(flavor, target or DEFAULT_TARGET):
        start = time.monotonic()
        try:
            found = step()
        except OpenNeutronError as error:
            passed, found = False, f"{type(error).__name__}: {error}"
        lines.append(f"[{'ok' if passed else 'FAILED'}] {name} ({time.monotonic() - start:.1f} s): {found}")
        if not passed:
            break
    lines.append("All checks passed." if passed else "Send this report, and the version of your SDK, with the issue.")
    return ConverterCheck("\n".join(lines) + "\n", passed)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _steps(flavor: str | None, target: str) -> Iterator[tuple[str, Callable[[], str]]]:
    """Returns the names and functions of the checks, in order. Checks share the state of one `_ConverterChecks`."""
    checks = _ConverterChecks(_tiny_model())
    yield "a converter for this flavour", lambda: checks.choose_converter(flavor)
    yield f"convert a convolution for {target}", lambda: checks.convert(CompileOptions(target))
    yield "the microcode's header", checks.header
    for name in ("fetch_constants_to_sram", "dump_kernel_selection_code", "use_profiling"):
        options = CompileOptions(target, **{name: True})  # type: ignore[arg-type]
        yield f"with {name}", partial(checks.convert, options)


@dataclass
class _ConverterChecks:
    model: bytes
    converter: sdk.Converter | None = None
    payload: bytes = b""

    def choose_converter(self, flavor: str | None) -> str:
        self.converter = sdk.choose_converter(flavor)
        return str(self.converter)

    def convert(self, options: CompileOptions) -> str:
        converter = self.converter or sdk.choose_converter(None)
        request = sdk.Conversion(self.model, options.target, converter_flags(options))
        converted = sdk.convert(request, converter, time_limit=TIME_LIMIT_SECONDS)
        self.payload = device_payload(PayloadHeader((1,), (1,), (0,), (0,), 1), converted.tflite)
        done = f"{len(self.model)} bytes of TFLite became {len(self.payload)} bytes of payload"
        if not options.use_profiling:
            return done
        kernels = kernels_of(converted.log, self.model)
        known = ", ".join(f"{kernel.name} for {'/'.join(kernel.nodes) or 'nothing known'}" for kernel in kernels)
        return f"{done}; kernels in its text: {known or 'none, so a profile cannot be mapped to operators'}"

    def header(self) -> str:
        payload = parse(self.payload)
        return str(microcode_header(payload.microcode, payload.header.version))


def _tiny_model() -> bytes:
    """Returns the TFLite file of a 3x3 convolution with 8 channels on an 8x8 image."""
    int8, int32, pattern = np.dtype(np.int8), np.dtype(np.int32), np.arange(8 * 3 * 3 * 8)
    image = Tensor((1, 8, 8, 8), int8, QParams.per_tensor(0.05, 0))
    weight = (pattern * 37 % 251 - 125).astype(np.int8).reshape(8, 3, 3, 8)
    filters = Tensor(weight.shape, int8, QParams.per_tensor(0.01, 0), weight)
    bias = Tensor((8,), int32, QParams.per_tensor(0.05 * 0.01, 0), np.arange(8, dtype=np.int32))
    output = Tensor((1, 8, 8, 8), int8, QParams.per_tensor(0.2, 0))
    attrs = {
        "padding": "SAME", "stride_h": 1, "stride_w": 1, "dilation_h_factor": 1, "dilation_w_factor": 1,
        "fused_activation_function": "RELU",
    }  # fmt: skip
    graph = Graph((image,), (output,), (Op(CONV_2D, (image, filters, bias), output, attrs, "conv"),))
    return tflite.write(graph, names=True)

"""From portable payloads to device payloads: what the vendor's converter gave back, in the container of the runtime."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openneutron.compile_spec import CompileOptions
from openneutron.core.files import write_file
from openneutron.errors import ConverterError, ModelError, OptionError
from openneutron.formats import pte, tflite
from openneutron.formats.payload import Payload, PayloadHeader, pack_device, parse
from openneutron.vendor.profiling import Kernel, kernels_of
from openneutron.vendor.sdk import (
    DEFAULT_FLAGS,
    TIME_LIMIT_SECONDS,
    Conversion,
    Converted,
    Converter,
    ConverterWarning,
    convert_all,
    default_cache,
    merge_kernel_selections,
)

__all__ = [
    "CompiledProgram", "DevicePayload", "compile_payloads", "compile_program", "converter_flags", "device_payload",
    "kernel_selection_of", "kernel_selection_path", "options_of",
]  # fmt: skip

BACKEND = "NeutronBackend"
NEUTRON_GRAPH = "NeutronGraph"
CONSTANT_INPUTS = 3  # microcode, weights, kernels, behind the graph's inputs
# Behind the graph's outputs: scratch in version 0; scratch, profile and debug buffers in version 1.
BUFFER_OUTPUTS = {1: 0, 3: 1}
# ExecuTorch's own backend asks for these when it profiles; the map of operators is read from what is printed then.
PROFILING_FLAGS: Mapping[str, Any] = {
    "useProfiling": True, "dumpAfterImport": "console", "dumpAfterGenerate": "console", "verbose": True,
}  # fmt: skip


@dataclass(frozen=True)
class DevicePayload:
    """A compiled partition."""

    payload: bytes
    converted: Converted
    kernels: tuple[Kernel, ...] = ()
    """What the NPU runs, in its order; known only with `use_profiling`."""


@dataclass(frozen=True)
class CompiledProgram:
    """A `.pte` for the device."""

    program: bytes
    payloads: tuple[DevicePayload, ...]
    """What was compiled, in the order of the program's delegates."""
    kernel_selection: str | None
    """The C sources that `dump_kernel_selection_code` asks for, of all payloads; None without it."""


def kernel_selection_of(payloads: Sequence[DevicePayload], converter: Converter) -> str | None:
    """The kernel selections of all payloads in one C source; None where `dump_kernel_selection_code` was not set."""
    sources = [payload.converted.kernel_selection for payload in payloads]
    return merge_kernel_selections([source for source in sources if source is not None], converter)


def kernel_selection_path(program: Path) -> Path:
    """Where the kernel selection of a program goes: beside it, under the name that ExecuTorch's own script gives it."""
    return program.with_name(f"{program.stem}_kernel_selection.c")


def converter_flags(options: CompileOptions) -> dict[str, Any]:
    """The fields of the converter's `compilationOpts` that options ask for, `extra_flags` last.

    What is not asked for is not set: not every version of the converter has every field.
    `extra_flags` is text: "name=value" separated by spaces; a value is a number, True, False, or text. Raises
    `OptionError` for other text.
    """
    flags = {
        **DEFAULT_FLAGS,
        **({"fetchConstantsToSRAM": True} if options.fetch_constants_to_sram else {}),
        **({"dumpKernelSelectionCode": True} if options.dump_kernel_selection_code else {}),
        **(PROFILING_FLAGS if options.use_profiling else {}),
    }
    for item in (options.extra_flags or "").split():
        name, equals, value = item.partition("=")
        name = name.lstrip("-")
        if not equals or not name.isidentifier():
            raise OptionError(
                f"extra_flags takes 'name=value' items separated by spaces, name a field of the converter's "
                f"compilationOpts; '{item}' is none."
            )
        flags[name] = _flag_value(value)
    return flags


def _flag_value(text: str) -> object:
    if text in ("True", "False"):
        return text == "True"
    try:
        return int(text)
    except ValueError:
        return text


def compile_payloads(
    payloads: Sequence[Payload],
    options: CompileOptions,
    converter: Converter,
    *,
    time_limit: float = TIME_LIMIT_SECONDS,
    cache: Path | None = None,
    intermediates_dir: Path | None = None,
) -> tuple[DevicePayload, ...]:
    """Convert portable payloads side by side, or take them from `cache` (by default, the user's).

    `intermediates_dir` gets the TFLite file of each before and after. Raises `ConverterError` for the first that fails,
    `OutputError` where a file cannot be written.
    """
    flags = converter_flags(options)
    requests = [
        Conversion(payload.tflite, options.target, flags, f"partition {number}")
        for number, payload in enumerate(payloads)
    ]
    converted = convert_all(requests, converter, time_limit=time_limit, cache=cache or default_cache())
    if intermediates_dir is not None:
        for number, (request, result) in enumerate(zip(requests, converted, strict=True)):
            write_file(intermediates_dir / f"partition_{number}.tflite", request.tflite)
            write_file(intermediates_dir / f"partition_{number}_neutron.tflite", result.tflite)
    return tuple(
        DevicePayload(
            device_payload(payload.header, result.tflite, request.name),
            result,
            _kernels(request, result, converter) if options.use_profiling else (),
        )
        for payload, result, request in zip(payloads, converted, requests, strict=True)
    )


def _kernels(request: Conversion, result: Converted, converter: Converter) -> tuple[Kernel, ...]:
    kernels = kernels_of(result.log, request.tflite)
    if not kernels:
        warnings.warn(
            f"{converter} did not print the graphs of {request.name} as other versions do: the NPU's profile has the "
            "numbers of its kernels, but nothing says what they compute.",
            ConverterWarning,
            stacklevel=4,
        )
    return kernels


def device_payload(header: PayloadHeader, converted: bytes, name: str = "the model") -> bytes:
    """The device payload of a converted model; `header` is that of the portable payload it was converted from.

    Raises `ConverterError` where the converter left something outside of the NeutronGraph, or yielded something else
    than its interface says.
    """
    model = tflite.read(converted, f"the converter's result for {name}")
    if len(model.subgraphs) != 1:
        raise ConverterError(f"The converter gave back {len(model.subgraphs)} subgraphs for {name}, not one.")
    (graph,) = model.subgraphs
    outside = [operator.name for operator in graph.operators if operator.name != NEUTRON_GRAPH]
    nodes = [operator for operator in graph.operators if operator.name == NEUTRON_GRAPH]
    if outside or len(nodes) != 1:
        raise ConverterError(
            f"The converter did not take all of {name}: it made {len(nodes)} NeutronGraph operators and left "
            f"{', '.join(sorted(set(outside))) or 'nothing'} to the CPU. Keep those operators out of the partition "
            "with operators_not_to_delegate, or give the flavour of this converter as neutron_converter_flavor."
        )
    (node,) = nodes
    blocks = [_constant(tensor, name) for tensor in node.inputs[-CONSTANT_INPUTS:]]
    extra = len(node.outputs) - len(graph.outputs)
    if len(blocks) != CONSTANT_INPUTS or extra not in BUFFER_OUTPUTS:
        raise ConverterError(
            f"The NeutronGraph of {name} has {len(node.inputs)} inputs and {len(node.outputs)} outputs for "
            f"{len(graph.outputs)} outputs of the graph: no known interface."
        )
    inputs = _positions(node.inputs[:-CONSTANT_INPUTS], graph.inputs, f"an input of the NeutronGraph of {name}")
    outputs = _positions(node.outputs[: -extra or None], graph.outputs, f"an output of the NeutronGraph of {name}")
    device = PayloadHeader(
        input_formats=tuple(header.input_formats[index] for index in inputs),
        output_formats=tuple(header.output_formats[index] for index in outputs),
        input_map=tuple(header.input_map[index] for index in inputs),
        output_map=tuple(header.output_map[index] for index in outputs),
        argument_count=header.argument_count,
        version=BUFFER_OUTPUTS[extra],
    )
    return pack_device(device, *blocks)


def _constant(tensor: tflite.TensorInfo | None, name: str) -> bytes:
    if tensor is not None and tensor.shape == (0,):
        return b""
    if tensor is None or tensor.buffer is None or tensor.dtype != "UINT8":
        raise ConverterError(f"The NeutronGraph of {name} has no uint8 constants as its last three inputs.")
    return bytes(tensor.buffer.data)


def _positions(
    wanted: Iterable[tflite.TensorInfo | None], among: Sequence[tflite.TensorInfo], what: str
) -> tuple[int, ...]:
    known = {tensor.index: position for position, tensor in enumerate(among)}
    positions = [known.get(-1 if tensor is None else tensor.index, -1) for tensor in wanted]
    if sorted(positions) != list(range(len(among))):
        raise ConverterError(f"{what[:1].upper()}{what[1:]} is none of the graph's, or one is missing.")
    return tuple(positions)


def compile_program(
    data: bytes,
    converter: Converter,
    *,
    target: str | None = None,
    time_limit: float = TIME_LIMIT_SECONDS,
    cache: Path | None = None,
    intermediates_dir: Path | None = None,
    what: str = "the program",
) -> CompiledProgram:
    """A `.pte` with a device payload in the place of each portable one; all else in it stays byte for byte.

    Target and flags are those it was lowered with, kept in its compile specs. `time_limit` counts seconds for each
    payload. Raises `FormatError` for a broken file, `PayloadError` for a broken payload, `ModelError` for one without
    portable payloads, or with device payloads already, `ConverterError`.
    """
    ours = _delegates_of(data, what)
    if None in ours:
        raise ModelError(
            f"{what} holds its payloads inside the flatbuffer. Lower it again with ExecuTorch's default, "
            "ExecutorchBackendConfig(extract_delegate_segments=True)."
        )
    payloads = {segment: parse(delegate.payload) for segment, delegate in ours.items()}
    if not all(payload.is_portable for payload in payloads.values()):
        raise ModelError(f"{what} is compiled already: it holds microcode for the NPU. Compile the portable program.")
    options = CompileOptions.from_values(next(iter(ours.values())).compile_specs)
    if target is not None and target != options.target:
        raise OptionError(
            f"{what} was lowered for {options.target}, whose limits it keeps. Lower it again for {target} instead."
        )
    compiled = compile_payloads(
        list(payloads.values()),
        options,
        converter,
        time_limit=time_limit,
        cache=cache,
        intermediates_dir=intermediates_dir,
    )
    replaced = {
        segment: result.payload for segment, result in zip(payloads, compiled, strict=True) if segment is not None
    }
    program = pte.replace_payloads(data, replaced, what)
    return CompiledProgram(program, compiled, kernel_selection_of(compiled, converter))


def options_of(data: bytes, what: str = "the program") -> CompileOptions:
    """The options that a `.pte` was lowered with. Raises as `compile_program` does."""
    return CompileOptions.from_values(next(iter(_delegates_of(data, what).values())).compile_specs)


def _delegates_of(data: bytes, what: str) -> dict[int | None, pte.Delegate]:
    """Our delegates, by the segment that holds the payload; equal payloads share one."""
    delegates = [delegate for method in pte.read(data, what).methods for delegate in method.delegates]
    ours = {delegate.segment: delegate for delegate in delegates if delegate.backend == BACKEND}
    if not ours:
        raise ModelError(f"{what} has no delegate of {BACKEND}: there is nothing to compile.")
    return ours

"""Compiles portable payloads to device payloads: packs the converter's results in the runtime's container."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openneutron.compile_spec import CompileOptions, converter_fields
from openneutron.core.files import write_file
from openneutron.errors import ConverterError, ModelError, OptionError
from openneutron.formats import pte, tflite
from openneutron.formats.payload import (
    BUFFER_OUTPUTS,
    CONSTANT_INPUTS,
    NEUTRON_GRAPH,
    Payload,
    PayloadHeader,
    pack_device,
    parse,
)
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
    "etrecord_path", "kernel_selection_of", "kernel_selection_path", "options_of",
]  # fmt: skip

BACKEND = "NeutronBackend"
# ExecuTorch's own backend sets these flags for profiling. The map from kernels to operators is read from the text that
# the converter then prints.
PROFILING_FLAGS: Mapping[str, Any] = {
    "useProfiling": True, "dumpAfterImport": "console", "dumpAfterGenerate": "console", "verbose": True,
}  # fmt: skip


@dataclass(frozen=True)
class DevicePayload:
    """A compiled partition."""

    payload: bytes
    converted: Converted
    kernels: tuple[Kernel, ...] = ()
    """The NPU's kernels in order of execution; known only with `use_profiling`."""


@dataclass(frozen=True)
class CompiledProgram:
    """A `.pte` for the device."""

    program: bytes
    payloads: tuple[DevicePayload, ...]
    """The compiled payloads, in the order of the program's delegates."""
    kernel_selection: str | None
    """C source of the kernel selection for all payloads; None without `dump_kernel_selection_code`."""


def kernel_selection_of(payloads: Sequence[DevicePayload], converter: Converter) -> str | None:
    """Returns the kernel selections of all payloads as one C source; None without `dump_kernel_selection_code`."""
    sources = [payload.converted.kernel_selection for payload in payloads]
    return merge_kernel_selections([source for source in sources if source is not None], converter)


def kernel_selection_path(program: Path) -> Path:
    """Returns the path of a program's kernel selection: in the same folder, with the name that ExecuTorch's script
    uses.
    """
    return program.with_name(f"{program.stem}_kernel_selection.c")


def etrecord_path(program: Path) -> Path:
    """Returns the path of a program's ETRecord: in the same folder."""
    return program.with_name(f"{program.stem}_etrecord.bin")


def converter_flags(options: CompileOptions) -> dict[str, Any]:
    """Returns the fields of the converter's `compilationOpts` for options. `extra_flags` override other options.

    Contains only fields that the options set, because some versions of the converter lack some fields. Raises
    `OptionError` as `converter_fields` does.
    """
    return {
        **DEFAULT_FLAGS,
        **({"fetchConstantsToSRAM": True} if options.fetch_constants_to_sram else {}),
        **({"dumpKernelSelectionCode": True} if options.dump_kernel_selection_code else {}),
        **(PROFILING_FLAGS if options.use_profiling else {}),
        **converter_fields(options.extra_flags),
    }


def compile_payloads(
    payloads: Sequence[Payload],
    options: CompileOptions,
    converter: Converter,
    *,
    time_limit: float = TIME_LIMIT_SECONDS,
    cache: Path | None = None,
    intermediates_dir: Path | None = None,
) -> tuple[DevicePayload, ...]:
    """Converts portable payloads in parallel, or reads them from `cache` (by default, the user's cache).

    Writes the TFLite file of each payload, before and after conversion, to `intermediates_dir`. Raises `ConverterError`
    for the first payload that fails, `FormatError` for a damaged TFLite model, and `OutputError` if a file cannot be
    written.
    """
    for payload in payloads:
        tflite.check(payload.tflite)
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
            _kernels_of_log(request, result, converter) if options.use_profiling else (),
        )
        for payload, result, request in zip(payloads, converted, requests, strict=True)
    )


def _kernels_of_log(request: Conversion, result: Converted, converter: Converter) -> tuple[Kernel, ...]:
    kernels = kernels_of(result.log, request.tflite)
    if not kernels:
        warnings.warn(
            f"{converter} did not print the graphs of {request.name} in a known form. A profile of the NPU will have "
            "the numbers of the kernels, but not the operators that they compute.",
            ConverterWarning,
            stacklevel=4,
        )
    return kernels


def device_payload(header: PayloadHeader, converted: bytes, name: str = "the model") -> bytes:
    """Packs a converted model as a device payload. `header` belongs to the portable payload that was converted.

    Raises `ConverterError` if the converter left operators outside of the NeutronGraph, or if the interface of the
    NeutronGraph is unknown.
    """
    model = tflite.read(converted, f"the converter's result for {name}")
    if len(model.subgraphs) != 1:
        raise ConverterError(f"The converter returned {len(model.subgraphs)} subgraphs for {name}; expected one.")
    (graph,) = model.subgraphs
    outside = [operator.name for operator in graph.operators if operator.name != NEUTRON_GRAPH]
    nodes = [operator for operator in graph.operators if operator.name == NEUTRON_GRAPH]
    if outside or len(nodes) != 1:
        raise ConverterError(
            f"The converter did not convert all of {name}: it wrote {len(nodes)} NeutronGraph operators and left "
            f"{', '.join(sorted(set(outside))) or 'nothing'} to the CPU. Keep those operators out of the partition "
            "with operators_not_to_delegate, or give the flavour of this converter as neutron_converter_flavor."
        )
    (node,) = nodes
    blocks = [_constant_bytes(tensor, name) for tensor in node.inputs[-CONSTANT_INPUTS:]]
    extra = len(node.outputs) - len(graph.outputs)
    if len(blocks) != CONSTANT_INPUTS or extra not in BUFFER_OUTPUTS:
        raise ConverterError(
            f"The NeutronGraph of {name} has an unknown interface: {len(node.inputs)} inputs and {len(node.outputs)} "
            f"outputs, for {len(graph.outputs)} outputs of the graph."
        )
    inputs = _positions_of(node.inputs[:-CONSTANT_INPUTS], graph.inputs, f"an input of the NeutronGraph of {name}")
    outputs = _positions_of(node.outputs[: -extra or None], graph.outputs, f"an output of the NeutronGraph of {name}")
    device = PayloadHeader(
        input_formats=tuple(header.input_formats[index] for index in inputs),
        output_formats=tuple(header.output_formats[index] for index in outputs),
        input_map=tuple(header.input_map[index] for index in inputs),
        output_map=tuple(header.output_map[index] for index in outputs),
        argument_count=header.argument_count,
        version=BUFFER_OUTPUTS[extra],
    )
    return pack_device(device, *blocks)


def _constant_bytes(tensor: tflite.FileTensor | None, name: str) -> bytes:
    if tensor is not None and tensor.shape == (0,):
        return b""
    if tensor is None or tensor.buffer is None or tensor.dtype != "UINT8":
        raise ConverterError(f"The NeutronGraph of {name} has no uint8 constants as its last three inputs.")
    return bytes(tensor.buffer.data)


def _positions_of(
    wanted: Iterable[tflite.FileTensor | None], among: Sequence[tflite.FileTensor], what: str
) -> tuple[int, ...]:
    known = {tensor.index: position for position, tensor in enumerate(among)}
    positions = [known.get(-1 if tensor is None else tensor.index, -1) for tensor in wanted]
    if sorted(positions) != list(range(len(among))):
        raise ConverterError(f"{what[:1].upper()}{what[1:]} is missing, or the graph does not declare it.")
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
    """Replaces each portable payload of a `.pte` by a device payload. All other contents stay equal, byte for byte.

    Reads target and flags from the program's compile specs. `time_limit` is in seconds per payload.

    Raises `FormatError` for a damaged file, `PayloadError` for a damaged payload, `ModelError` for a program without
    portable payloads or with device payloads, `OptionError` for a `target` that differs from the program's, and
    `ConverterError` if the converter fails.
    """
    ours = _delegates_of(data, what)
    if None in ours:
        raise ModelError(
            f"{what} has its payloads inside the flatbuffer. Lower the model again with ExecuTorch's default, "
            "ExecutorchBackendConfig(extract_delegate_segments=True)."
        )
    payloads = {segment: parse(delegate.payload) for segment, delegate in ours.items()}
    if not all(payload.is_portable for payload in payloads.values()):
        raise ModelError(
            f"{what} is compiled already: it contains microcode for the NPU. Compile the portable program instead."
        )
    options = CompileOptions.from_values(next(iter(ours.values())).compile_specs)
    if target is not None and target != options.target:
        raise OptionError(
            f"{what} was lowered for {options.target} and observes the limits of that target. Lower the model again "
            f"for {target}."
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
    """Returns the options that a `.pte` was lowered with.

    Raises `FormatError` and `ModelError` as `compile_program`.
    """
    return CompileOptions.from_values(next(iter(_delegates_of(data, what).values())).compile_specs)


def _delegates_of(data: bytes, what: str) -> dict[int | None, pte.DelegateCall]:
    """Returns the calls of our delegate by the segment of the payload. Equal payloads share a segment."""
    delegates = [delegate for method in pte.read(data, what).methods for delegate in method.delegates]
    ours = {delegate.segment: delegate for delegate in delegates if delegate.backend == BACKEND}
    if not ours:
        raise ModelError(
            f"{what} has no delegate of {BACKEND}, so there is nothing to compile. Check the reasons in the placement "
            "of the program."
        )
    return ours

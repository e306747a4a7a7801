"""Reads a `.pte` or `.tflite` file, and estimates the memory and time that its model needs on the board."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from openneutron.compile_spec import CompileOptions
from openneutron.core.files import read_file
from openneutron.errors import FormatError, PayloadError
from openneutron.formats import pte, tflite
from openneutron.formats.payload import (
    BUFFER_OUTPUTS,
    CONSTANT_INPUTS,
    NEUTRON_GRAPH,
    Payload,
    microcode_header,
    parse,
)
from openneutron.model.arguments import INPUT_NAMES, input_names, output_names
from openneutron.report.board_parts import Contents, changes_of, parts_of, prefetch_window
from openneutron.report.contents import NEUTRON_BACKEND, Delegate, Report, Section, TensorSummary
from openneutron.report.estimate import Estimate, Fit
from openneutron.report.estimating import (
    combined_estimate,
    estimate_operators,
    fit_of,
    scratch_in_channels_last,
    with_board,
)
from openneutron.report.regions import fit_on_board
from openneutron.report.runtime_memory import RuntimeMemory, runtime_memory
from openneutron.report.tflite_ops import npu_operators
from openneutron.targets import NeutronTarget, NeutronTargetSpec, Target

__all__ = ["inspect", "inspect_bytes", "tensor_inputs"]

DEFAULT_TARGET = "imxrt700"


def inspect(path: str | os.PathLike[str], target: Target | None = None) -> Report:
    """Reads a `.pte` or `.tflite` file of any origin.

    `target` is the target of the estimates: a chip, a board or a board file. By default, it is the chip that a `.pte`
    was lowered for, else imxrt700. Raises `FormatError` with the offset of the error for a damaged file,
    `PayloadError` for a damaged payload of OpenNeutron, `InputError` for a file that cannot be read, and `TargetError`
    for an unknown target.
    """
    return inspect_bytes(read_file(path), str(Path(path)), target)


def tensor_inputs(path: str | os.PathLike[str]) -> dict[str, str]:
    """Returns the name of each tensor input of a `.pte` by its position: {"input0": "image"}. Imports no torch.

    Raises the errors of `inspect`.
    """
    program = pte.read(read_file(path), str(Path(path)))
    method = program.methods[0]
    names = _input_names(str(Path(path)), program, method)
    given = enumerate(zip(names, method.inputs, strict=True))
    return {f"input{index}": name for index, (name, value) in given if _is_tensor(value)}


def inspect_bytes(data: bytes, what: str, target: Target | None = None) -> Report:
    """Reads the bytes of a file as `inspect` does. The report and errors call the file `what`."""
    identifier = data[4:8]
    chosen = None if target is None else NeutronTargetSpec(target).neutron_target
    if identifier[:2] == b"ET":
        return _inspect_pte(what, data, chosen)
    if identifier == b"TFL3":
        return _inspect_tflite(what, data, chosen)
    raise FormatError(
        f"{what}: byte 4: expected 'ET12' of an ExecuTorch program or 'TFL3' of a TFLite file, found {identifier!r}"
    )


def _inspect_pte(path: str, data: bytes, target: NeutronTarget | None) -> Report:
    program = pte.read(data, path)
    method = program.methods[0]
    inputs, outputs = _input_names(path, program, method), output_names(method.outputs_tree, len(method.outputs))
    target = target or _target_of(method)
    calls = [call for call in method.calls if isinstance(call, pte.DelegateCall)]
    delegates = tuple(_delegate_of_pte(call, f"delegate{number}", target) for number, call in enumerate(calls))
    segments = {call.segment: call.backend for call in calls}
    sections = [Section("flatbuffer", program.flatbuffer_bytes)]
    for number, segment in enumerate(program.segments):
        what = f"payload of {segments[number]}" if number in segments else "constants"
        sections.append(Section(f"segment {number}: {what}", segment.size))
    sections.append(Section("padding", len(data) - sum(section.bytes for section in sections)))
    return Report(
        path=path,
        format="pte",
        bytes=len(data),
        description=f"ExecuTorch program, method '{method.name}'",
        inputs=tuple(map(_summarize_program_value, inputs, method.inputs)),
        outputs=tuple(map(_summarize_program_value, outputs, method.outputs)),
        delegates=delegates,
        cpu_operators=tuple(call.name for call in method.calls if isinstance(call, pte.KernelCall)),
        planned_bytes=sum(method.planned_bytes),
        sections=tuple(sections),
        estimate=_on_board(_estimate_of(method, delegates, target), method, delegates, len(data), target),
    )


def _on_board(
    estimate: Estimate, method: pte.Method, delegates: Sequence[Delegate], file_bytes: int, target: NeutronTarget
) -> Estimate:
    """Adds the verdict on the board's regions, if the target is a board whose regions are known."""
    if target.board is None or not target.board.regions:
        return estimate
    ours = [call for call in method.delegates if call.backend == NEUTRON_BACKEND]
    fetches = any(CompileOptions.from_values(call.compile_specs).fetch_constants_to_sram for call in ours)
    weights = sum(one.weight_bytes for one in delegates)
    replaced = sum(one.payload_bytes - one.weight_bytes for one in delegates if one.kind == "portable")
    contents = Contents(
        program_bytes=file_bytes - replaced,
        scratch_bytes=max((one.scratch_bytes for one in delegates), default=0),
        weight_bytes=weights,
        uses_npu=bool(ours),
        fetches=fetches,
        npu_reads_program=bool(ours) and not fetches and target.neutron_class == "Neutron-C",
    )
    window = _window(estimate, delegates) if fetches else 0
    changes = changes_of(estimate, contents, window=window)
    return with_board(
        estimate, fit_on_board(parts_of(estimate, contents, window=window), target.board, changes), target
    )


def _window(estimate: Estimate, delegates: Sequence[Delegate]) -> int:
    """Returns the bytes for weights that are copied from flash: read from microcode, else estimated."""
    known = [one.microcode.sram_scratch_bytes for one in delegates if one.microcode]
    return max(known) if known else prefetch_window(estimate.layers)


def _estimate_of(method: pte.Method, delegates: Sequence[Delegate], target: NeutronTarget) -> Estimate:
    """Returns the estimate of a method, with the runtime's memory and the savings of channels-last inputs."""
    estimate = _combine_estimates(delegates, target, runtime_memory(method))
    estimate = replace(estimate, fit=_fit_with_microcode(estimate, delegates, target))
    ours = (call for call in method.delegates if call.backend == NEUTRON_BACKEND)
    portable = [payload for payload in (parse(call.payload) for call in ours) if payload.is_portable]
    if len(portable) != 1 or not all(_only_converts(call) for call in method.calls if isinstance(call, pte.KernelCall)):
        return estimate  # other delegates or CPU operators may need the transposes
    operators = _graph_of(portable[0]).operators
    pools = estimate.memory.pools if estimate.memory else None
    if pools is None:
        return estimate
    transposed = max((one.transposed_bytes for one in pools.delegates), default=0)
    removable = transposed + estimate.scratch_bytes - scratch_in_channels_last(operators, target)
    saved = min(removable, pools.device.temporary.used_bytes - pools.search_bytes)
    return replace(estimate, channels_last_saves=max(0, saved))


def _fit_with_microcode(estimate: Estimate, delegates: Sequence[Delegate], target: NeutronTarget) -> Fit:
    """Compares the program's needs with the target's memory. Uses the sizes in the microcode of compiled delegates."""
    scratch = max((one.scratch_bytes for one in delegates), default=0)
    weights = sum(one.weight_bytes for one in delegates if one.microcode)
    outside = estimate.memory.total_bytes if estimate.memory else 0
    return fit_of(estimate.layers, scratch, outside + weights, target)


def _only_converts(call: pte.KernelCall) -> bool:
    return call.name.split("::")[0] == "quantized_decomposed"


def _target_of(method: pte.Method) -> NeutronTarget:
    """Returns the target of the first delegate of the NPU, or the default target if there is none."""
    ours = (delegate for delegate in method.delegates if delegate.backend == NEUTRON_BACKEND)
    named = [CompileOptions.from_values(delegate.compile_specs).target for delegate in ours]
    return NeutronTargetSpec(named[0] if named else DEFAULT_TARGET).neutron_target


def _combine_estimates(
    delegates: Sequence[Delegate], target: NeutronTarget, memory: RuntimeMemory | None = None
) -> Estimate:
    return combined_estimate([delegate.estimate for delegate in delegates if delegate.estimate], target, memory)


def _summarize_program_value(name: str, value: pte.ProgramValue) -> TensorSummary:
    return TensorSummary(name, value.shape, value.dtype, channels_last=value.dim_order == (0, 2, 3, 1))


def _input_names(path: str, program: pte.Program, method: pte.Method) -> tuple[str, ...]:
    """Returns the names that `HostProgram.input_names` returns. Raises `FormatError` for a wrong list in the file."""
    texts = [one.outputs[0].constant for one in program.methods if one.name == INPUT_NAMES and one.outputs]
    try:
        return input_names(str(texts[0]) if texts else None, method.inputs_tree, list(map(_is_tensor, method.inputs)))
    except ValueError as error:
        raise FormatError(f"{path}: the names of its inputs cannot be read: {error}. Lower the model again.") from error


def _is_tensor(value: pte.ProgramValue) -> bool:
    return value.constant is None and value.dtype != "none"


def _delegate_of_pte(call: pte.DelegateCall, name: str, target: NeutronTarget) -> Delegate:
    """Reads a call of a delegate. A tensor has the name of its TFLite tensor, or "delegate0.output0" without one."""
    if call.backend != NEUTRON_BACKEND:
        return Delegate("foreign", call.backend, None, len(call.payload))
    payload = parse(call.payload)
    named = CompileOptions.from_values(call.compile_specs).target
    header = payload.header
    if not payload.is_portable:
        arguments = call.arguments
        if len(arguments) < header.argument_count + len(header.output_map):
            raise FormatError(
                f"A call of the delegate has {len(arguments)} arguments, but its payload has {header.argument_count} "
                f"inputs and {len(header.output_map)} outputs."
            )
        inputs = tuple(
            _summarize_program_value(f"{name}.input{i}", arguments[at]) for i, at in enumerate(header.input_map)
        )
        outputs = tuple(
            _summarize_program_value(f"{name}.output{i}", arguments[header.argument_count + at])
            for i, at in enumerate(header.output_map)
        )
        microcode = microcode_header(payload.microcode, header.version)
        return Delegate("device", call.backend, named, len(call.payload), inputs, outputs, (), microcode)
    graph = _graph_of(payload)
    return Delegate(
        kind="portable",
        backend=call.backend,
        target=named,
        payload_bytes=len(call.payload),
        inputs=_summarize_tensors(graph.inputs, header.input_formats),
        outputs=_summarize_tensors(graph.outputs, header.output_formats),
        operators=tuple(operator.name for operator in graph.operators),
        estimate=estimate_operators(graph.operators, target),
    )


def _graph_of(payload: Payload) -> tflite.Subgraph:
    """Reads the graph of a portable payload. Raises `PayloadError` if the graph does not match the payload's header."""
    model, header = tflite.read_checked(payload.tflite), payload.header
    counts = [(len(graph.inputs), len(graph.outputs)) for graph in model.subgraphs]
    expected = (len(header.input_formats), len(header.output_formats))
    if counts != [expected]:
        raise PayloadError(
            f"The delegate payload's header has {expected} inputs and outputs, but the graphs of its TFLite model have "
            f"{counts or 'none'}."
        )
    return model.subgraphs[0]


def _summarize_tensors(tensors: Sequence[tflite.FileTensor], formats: Sequence[int]) -> tuple[TensorSummary, ...]:
    return tuple(
        _summarize_tensor(tensor, channels_last=bool(flag)) for tensor, flag in zip(tensors, formats, strict=True)
    )


def _summarize_tensor(tensor: tflite.FileTensor, *, channels_last: bool = False) -> TensorSummary:
    quantization = tensor.quantization
    scale, zero_point = (quantization.scale[0], quantization.zero_point[0]) if quantization else (None, None)
    return TensorSummary(tensor.name, tensor.shape, tensor.dtype.lower(), scale, zero_point, channels_last)


def _inspect_tflite(path: str, data: bytes, target: NeutronTarget | None) -> Report:
    model = tflite.read(data, path)
    if not model.subgraphs:
        raise FormatError(f"{path}: the model has no subgraph")
    graph = model.subgraphs[0]
    nodes = [operator for operator in graph.operators if operator.is_custom and operator.name == NEUTRON_GRAPH]
    taken = nodes or npu_operators(graph)
    target = target or NeutronTargetSpec(DEFAULT_TARGET).neutron_target
    delegates = tuple(map(_delegate_of_converted_tflite, nodes)) if nodes else _delegate_of_plain_tflite(taken, target)
    on_npu = set(map(id, taken))
    return Report(
        path=path,
        format="tflite",
        bytes=len(data),
        description=" ".join(model.description.split()),
        inputs=tuple(_summarize_tensor(tensor) for tensor in graph.inputs),
        outputs=tuple(_summarize_tensor(tensor) for tensor in graph.outputs),
        delegates=delegates,
        cpu_operators=tuple(operator.name for operator in graph.operators if id(operator) not in on_npu),
        planned_bytes=0,
        sections=(
            Section("constants", model.constant_bytes),
            Section("tables and padding", len(data) - model.constant_bytes),
        ),
        estimate=_combine_estimates(delegates, target),
    )


def _delegate_of_plain_tflite(operators: Sequence[tflite.Operator], target: NeutronTarget) -> tuple[Delegate, ...]:
    """Returns the NPU's part of an unconverted model as a delegate; an empty tuple if the NPU runs no operator."""
    if not operators:
        return ()
    weights = {
        tensor.buffer.number: len(tensor.buffer.data)
        for operator in operators
        for tensor in operator.inputs
        if tensor is not None and tensor.buffer is not None
    }
    delegate = Delegate(
        kind="plain",
        backend=NEUTRON_BACKEND,
        target=None,
        payload_bytes=sum(weights.values()),
        operators=tuple(operator.name for operator in operators),
        estimate=estimate_operators(operators, target),
    )
    return (delegate,)


def _delegate_of_converted_tflite(node: tflite.Operator) -> Delegate:
    """Reads a NeutronGraph operator, which the vendor's converter writes into a TFLite file."""
    *inputs, code, weights, kernels = [None] * CONSTANT_INPUTS if len(node.inputs) < CONSTANT_INPUTS else node.inputs
    blocks = [block.buffer for block in (code, weights, kernels) if block is not None and block.buffer is not None]
    if code is None or code.buffer is None:
        raise FormatError(f"The {NEUTRON_GRAPH} operator has no microcode among its {len(node.inputs)} inputs.")
    outputs = [tensor for tensor in node.outputs if tensor.dtype != "UINT8"]
    version = BUFFER_OUTPUTS.get(len(node.outputs) - len(outputs), 0)
    return Delegate(
        kind="device",
        backend=NEUTRON_BACKEND,
        target=None,
        payload_bytes=sum(len(block.data) for block in blocks),
        inputs=tuple(_summarize_tensor(tensor) for tensor in inputs if tensor is not None),
        outputs=tuple(map(_summarize_tensor, outputs)),
        microcode=microcode_header(code.buffer.data, version),
    )

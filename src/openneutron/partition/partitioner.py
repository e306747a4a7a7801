"""The partitioner of the documented flow, `NeutronPartitioner`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import executorch.kernels.quantized  # noqa: F401  registers the out variants that to_executorch requires
import torch
from executorch.exir.backend.backend_details import BackendDetails, CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec, Partitioner, PartitionResult
from torch.export import ExportedProgram
from torch.fx import Node

from openneutron.compile_spec import CompileOptions
from openneutron.core.boundary import typed_errors
from openneutron.core.files import write_file
from openneutron.cpu.kernels import check_cpu_kernels
from openneutron.errors import OptionError
from openneutron.formats.payload import Payload
from openneutron.partition.backend import NeutronBackend
from openneutron.partition.compile import compile_partition
from openneutron.partition.delegate_call import (
    Trace,
    is_decomposed,
    is_delegate_call,
    is_partitioned,
    is_trace,
    replace_partitions,
)
from openneutron.partition.dependency_caches import forget_lowered_programs
from openneutron.partition.dim_orders import assign_dim_orders
from openneutron.partition.placing import Placed, Placement, place
from openneutron.partition.scheduling import Partition
from openneutron.targets import NeutronTargetSpec, Target
from openneutron.vendor.device import DevicePayload, compile_payloads, kernel_selection_of
from openneutron.vendor.sdk import Converter, converter_for

__all__ = [
    "CpuWarning", "NeutronPartitioner", "check_cpu_operators", "compile_placed", "cpu_message", "origins_of",
]  # fmt: skip


class CpuWarning(UserWarning):
    """Lists the operators that run on the CPU, each with its reason."""


class NeutronPartitioner(Partitioner):
    """Assigns the operators that the NPU supports to delegates. An argument of `to_edge_transform_and_lower`.

    `compile_spec` comes from `generate_neutron_compile_spec`. `neutron_target_spec` (or `target`) is optional, and must
    name the same target. The partitions are found and compiled in the exported ATen program, before ExecuTorch's
    decompositions. A `CpuWarning` lists the operators that run on the CPU; `openneutron.placement` returns them.

    Payloads are portable, unless the option `payload` selects device payloads, which the vendor's converter makes.
    With `dump_kernel_selection_code`, the file `KERNEL_SELECTION` is then written to `intermediates_dir`, or to the
    current folder.

    Raises `OptionError` for invalid options. `to_edge_transform_and_lower` raises `ModelError` for a model that cannot
    be lowered, and `ConverterError` if the vendor's converter is missing or fails.

        spec = generate_neutron_compile_spec("imxrt700")
        edge = to_edge_transform_and_lower(torch.export.export(module, inputs), partitioner=[NeutronPartitioner(spec)])
        buffer = edge.to_executorch().buffer
    """

    KERNEL_SELECTION = "partitions_kernel_selection.c"

    def __init__(
        self,
        compile_spec: Sequence[CompileSpec],
        neutron_target_spec: Target | None = None,
        *,
        target: Target | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        _refuse_second_backend()
        unused = {name for name, value in options.items() if value is not None} - {
            "custom_delegation_options", "post_quantization_state_dict", "preserve_ops",
        }  # fmt: skip
        if unused:
            raise OptionError(f"NeutronPartitioner has no option {', '.join(sorted(unused))}.")
        self.options = CompileOptions.from_specs(compile_spec)
        named = neutron_target_spec or target
        if named is not None and NeutronTargetSpec(named).name != self.options.target:
            raise OptionError(
                f"The compile spec is for target '{self.options.target}', but the partitioner is for "
                f"'{NeutronTargetSpec(named).name}'. Give the same target to both."
            )
        # The .pte records neither the requested form of the payload nor the folder of intermediate files, so that its
        # bytes do not depend on the machine.
        recorded = replace(self.options, payload="auto", intermediates_dir=None)
        self.delegation_spec = DelegationSpec(NeutronBackend.__name__, recorded.to_specs())

    def transform_for_pre_decomposition(self, exported_program: ExportedProgram) -> ExportedProgram:
        """Finds and compiles the partitions. `to_edge_transform_and_lower` calls it.

        Returns a copy of `exported_program` in which each partition is a delegate call. A result of `compile_placed` is
        returned unchanged. Raises `OptionError`, `ModelError` and `ConverterError`.
        """
        if is_partitioned(exported_program):
            return exported_program
        with typed_errors("Partitioning the program"):
            placed = place(exported_program, self.options)
            check_cpu_operators(placed)
        _warn_of_cpu_operators(placed.rows)
        return compile_placed(placed)

    def ops_to_not_decompose(
        self, ep: ExportedProgram
    ) -> tuple[list[torch._ops.OpOverload], Callable[[Node], bool] | None]:
        """Returns no operators, and a check that refuses all nodes if `ep` has nothing to decompose.

        Without a check, ExecuTorch looks up all operators of `ep` in its table of decompositions. To fill this table,
        torch searches all operators of all libraries, which takes a third of the time of the lowering.
        """
        return [], (lambda _: False) if is_decomposed(ep) else None

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        """Tags the delegate calls of an edge program. `to_edge_transform_and_lower` calls it.

        Raises `OptionError` for a program that is not a result of `transform_for_pre_decomposition`.
        """
        if not is_partitioned(exported_program):
            raise OptionError(
                "NeutronPartitioner works on the program before ExecuTorch decomposes it, and to_backend() runs after "
                "that. Call to_edge_transform_and_lower(exported_program, partitioner=[NeutronPartitioner(...)]) "
                "instead of to_edge(exported_program).to_backend(...)."
            )
        forget_lowered_programs()  # those of earlier calls
        _keep_initial_states(exported_program)
        tags: dict[str, DelegationSpec] = {}
        for node in exported_program.graph.nodes:
            if not is_delegate_call(node):
                continue
            tag = f"neutron_{len(tags)}"
            tags[tag] = self.delegation_spec
            for tagged in (node, node.args[1], *node.users, *_traces_after(node)):
                tagged.meta["delegation_tag"] = tag
        return PartitionResult(tagged_exported_program=exported_program, partition_tags=tags)


@typed_errors("Partitioning the program")
def compile_placed(placed: Placed) -> ExportedProgram:
    """Compiles the partitions with the options of `placed`. `placed.program` is unchanged.

    Returns a program in which each partition is a delegate call with its payload. Raises `ModelError` and
    `ConverterError`.
    """
    options, partitions = placed.graphs.options, placed.partitions
    orders = assign_dim_orders(placed.program, partitions)
    payloads = [compile_partition(placed.graphs, partition, orders.is_channels_last) for partition in partitions]
    folder = _intermediates_dir(options)
    if folder is not None:
        for number, payload in enumerate(payloads):
            write_file(folder / f"partition_{number}.tflite", payload.tflite)
    converter = converter_for(options.payload, options.neutron_converter_flavor)
    if converter is None or not payloads:
        return replace_partitions(placed.program, partitions, [payload.pack() for payload in payloads], orders)
    compiled = _device_payloads(payloads, options, converter)
    traces = [_traces_of(*pair) for pair in zip(partitions, compiled, strict=True)] if options.use_profiling else ()
    return replace_partitions(placed.program, partitions, [result.payload for result in compiled], orders, traces)


def origins_of(placed: Placed) -> tuple[tuple[str, ...], ...]:
    """Returns, for each partition, the node that each operator of its TFLite model came from, in their order.

    After `compile_placed`, this takes the IR that was compiled.
    """
    orders = assign_dim_orders(placed.program, placed.partitions)
    graphs = (placed.graphs.formatted(partition, orders.is_channels_last).graph for partition in placed.partitions)
    return tuple(tuple(op.origin for op in graph.ops) for graph in graphs)


def _intermediates_dir(options: CompileOptions) -> Path | None:
    return None if options.intermediates_dir is None else Path(options.intermediates_dir)


def _device_payloads(
    portable: Sequence[Payload], options: CompileOptions, converter: Converter
) -> Sequence[DevicePayload]:
    """Converts the payloads to device payloads, and writes the kernel selection if the options request it."""
    folder = _intermediates_dir(options)
    compiled = compile_payloads(portable, options, converter, intermediates_dir=folder)
    selection = kernel_selection_of(compiled, converter)
    if selection is not None:
        write_file((folder or Path()) / NeutronPartitioner.KERNEL_SELECTION, selection.encode())
    return compiled


def _keep_initial_states(program: ExportedProgram) -> None:
    """Marks states so that ExecuTorch stores their initial values; otherwise their memory is uninitialized."""
    signature = program.graph_signature
    written = set(signature.buffers_to_mutate.values())
    for node in program.graph.nodes:
        if node.op == "placeholder" and signature.inputs_to_buffers.get(node.name) in written:
            # ExecuTorch stores no initial values of a state without elements, and reads them anyway if it is marked.
            node.meta["et_init_buffer"] = node.meta["val"].numel() > 0
            # ExecuTorch's passes run the write, and torch refuses to write to a buffer that requires gradients.
            node.meta["val"] = node.meta["val"].detach()


def _traces_of(partition: Partition, compiled: DevicePayload) -> list[Trace]:
    """Returns the operators of a partition, each with the kernels that compute it."""
    kernels = compiled.kernels
    nodes = [cluster.node for cluster in partition.clusters] if kernels else []
    return [
        Trace(node, tuple(i for i, kernel in enumerate(kernels) if node.name in kernel.nodes), len(kernels))
        for node in nodes
    ]


def _traces_after(node: Node) -> Iterator[Node]:
    pending = [trace for item in node.users for trace in item.users if is_trace(trace)]
    while pending:
        trace = pending.pop()
        yield trace
        pending += filter(is_trace, trace.users)


def _refuse_second_backend() -> None:
    """Raises `OptionError` if another backend with this class name was imported, such as ExecuTorch's own NXP backend.

    ExecuTorch finds a backend by the name of its class.
    """
    named = [backend for backend in BackendDetails.__subclasses__() if backend.__name__ == NeutronBackend.__name__]
    others = [f"{backend.__module__}" for backend in named if backend is not NeutronBackend]
    if others:
        raise OptionError(
            f"'{others[0]}' has a backend named {NeutronBackend.__name__} too, and ExecuTorch may use either. Load one "
            "of them in a process: run scripts written for the other with `python -m openneutron.dropin`."
        )


def check_cpu_operators(placed: Placed) -> None:
    """Raises `ModelError` for an operator that neither the NPU nor ExecuTorch's CPU kernels support."""
    reasons = {row.node: row.reason or "" for row in placed.rows if row.where == "cpu"}
    nodes = [node for node in placed.program.graph.nodes if node.name in reasons]
    check_cpu_kernels([(node, reasons[node.name]) for node in nodes], trusts_table=True)


def _warn_of_cpu_operators(rows: Sequence[Placement]) -> None:
    left = [row for row in rows if row.where == "cpu"]
    if left or not rows:
        warnings.warn(cpu_message(rows), CpuWarning, stacklevel=4)


def cpu_message(rows: Sequence[Placement]) -> str:
    """Returns a message that lists each CPU operator with its reason. It says so if nothing runs on the NPU."""
    if not rows:
        return "Nothing of this program runs on the NPU: it has no operators."
    lines = "\n".join(_row_text(row) for row in rows if row.where == "cpu")
    if all(row.where == "cpu" for row in rows):
        return f"Nothing of this program runs on the NPU. These operators run on the CPU:\n{lines}"
    return f"These operators run on the CPU:\n{lines}"


def _row_text(row: Placement) -> str:
    return f"  {row.node} ({row.op}, {row.source or f'module {row.module!r}'}): {row.reason}"

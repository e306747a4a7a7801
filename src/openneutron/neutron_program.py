"""The result of `lower`."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from openneutron.core.files import output_path, write_files
from openneutron.core.locks import ForkSafeLock, Order
from openneutron.core.tables import ResultTable, ShownAsTable
from openneutron.formats import pte
from openneutron.formats.method_memory import MethodMemory, memory_of
from openneutron.model.arguments import Leaf, names_of_leaves, output_names
from openneutron.partition.placing import count_delegates, summary_lines
from openneutron.results.lowered_program import LoweredProgram
from openneutron.results.named_values import NamedValue
from openneutron.runtime.memory import measure
from openneutron.runtime.native import is_installed
from openneutron.runtime.program import HostProgram
from openneutron.targets import Target
from openneutron.vendor.device import etrecord_path, kernel_selection_path

if TYPE_CHECKING:
    from openneutron.firmware import Package, PackageOptions
    from openneutron.quantized_model import QuantizedModel
    from openneutron.report.estimate import Estimate
    from openneutron.results.layerwise_accuracy import LayerwiseAccuracy

__all__ = ["NeutronProgram"]

_LOADING = ForkSafeLock(Order.LOADING)


@dataclass(frozen=True)
class NeutronProgram(LoweredProgram, ShownAsTable):
    """A lowered program: a `.pte` and its placement. `lower` returns it."""

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The shape and dtype of each input of the `.pte`, and the qparams of inputs that `int8_io` changed to int8.

        An entry is a `TensorInfo` for a tensor, and a `ConstantInfo` for a number, a bool, a string or None.
        """
        return self._loaded.inputs

    @property
    def outputs(self) -> tuple[Any, ...]:
        """The shape and dtype of each output of the `.pte`, in the form of `inputs`."""
        return self._loaded.outputs

    @functools.cached_property
    def memory(self) -> MethodMemory:
        """The memory of `forward` on the board and on this machine (see `MethodMemory`).

        The sizes on the board belong to `buffer`. To measure the memory on this machine, the portable program is loaded
        and run once; without the native module, the result has no measurements.
        """
        return memory_of(self.buffer, measured=measure(self.portable) if is_installed() else None)

    def __str__(self) -> str:
        short = {"input": "in ", "output": "out"}
        return "\n".join([
            f"{self._kind}, which {'the board' if self.is_device else 'this host'} runs; for {self.target}, "
            f"{len(self.buffer):,} bytes",
            *(f"  {short[where]} {value.name}: {value.content}" for where, value in self._edges()),
            *summary_lines(self.placement),
        ])  # fmt: skip

    def as_table(self) -> ResultTable:
        """Returns the inputs, the outputs and the placement, with the reason for each operator on the CPU."""
        left = [row for row in self.placement if row.where == "cpu"]
        delegates = count_delegates(self.placement)
        parts = f"{delegates} delegate{'s' * (delegates != 1)}"
        rows = [
            *((where, f"{value.name}: {value.content}") for where, value in self._edges()),
            ("operators on the NPU", f"{len(self.placement) - len(left)} in {parts}"),
            ("operators on the CPU", str(len(left))),
            *(("on the CPU", f"{row.node} ({row.op}): {row.reason}") for row in left),
        ]
        title = f"{self._kind} for {self.target}, {len(self.buffer):,} bytes"
        return ResultTable(title, ("property", "value"), tuple(rows))

    def as_dict(self) -> dict[str, Any]:
        """Returns the size, the placement, the inputs and the outputs as values that JSON has."""
        edges = [(where, value.as_dict()) for where, value in self._edges()]
        on_cpu = sum(row.where == "cpu" for row in self.placement)
        return {
            "bytes": len(self.buffer),
            "target": self.target,
            "is_device": self.is_device,
            "on_npu": len(self.placement) - on_cpu,
            "on_cpu": on_cpu,
            "delegates": count_delegates(self.placement),
            "inputs": [one for where, one in edges if where == "input"],
            "outputs": [one for where, one in edges if where == "output"],
            "placement": [asdict(row) for row in self.placement],
        }

    @property
    def _kind(self) -> str:
        return "Device program" if self.is_device else "Portable program"

    def _edges(self) -> Iterator[tuple[str, NamedValue]]:
        """Returns each input with "input", and each output with "output".

        The constants among the inputs are those of `leaves`, because a `.pte` has None for a text.
        """
        method = pte.read(self.portable).methods[0]
        names = names_of_leaves(self.leaves or (), len(method.inputs))
        leaves = self.leaves or (None,) * len(method.inputs)
        for name, value, leaf in zip(names, method.inputs, leaves, strict=True):
            yield "input", _named_value(name, value, leaf)
        outputs = output_names(method.outputs_tree, len(method.outputs))
        for name, value in zip(outputs, method.outputs, strict=True):
            yield "output", _named_value(name, value)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `buffer` to `path`, in a temporary file that is then renamed. Raises `OutputError` if that fails.

        `kernel_selection` and `etrecord`, if any, are written to the same folder: "model_kernel_selection.c" and
        "model_etrecord.bin" for "model.pte".
        """
        write_files(self.files(output_path(path)))

    def files(self, path: Path) -> dict[Path, bytes]:
        """Returns the files that `save` writes, with their contents."""
        files = {path: self.buffer}
        if self.etrecord is not None:
            files[etrecord_path(path)] = self.etrecord
        if self.kernel_selection is not None:
            files[kernel_selection_path(path)] = self.kernel_selection.encode()
        return files

    def run(self, *inputs: Any, **named: Any) -> Any:
        """Runs the portable program on this machine, like `HostProgram.run`.

        Takes tensors or numpy arrays of the shapes and dtypes of `inputs`, as the arguments of `forward`. Returns one
        tensor for a program with one output, else a tuple. The program is loaded once and keeps its state between
        calls. Calls from several threads run one after the other. Raises `InputError` for inputs that the program does
        not take, `HostError` if the run fails, and `NativeModuleError` if the native module is not installed.
        """
        return self._loaded.run(*inputs, **named)

    def reset(self) -> None:
        """Restores the initial state of the program. Does nothing for a program without state."""
        self._loaded.reset()

    def package(self, folder: str | os.PathLike[str], **options: Unpack[PackageOptions]) -> Package:
        """Writes a new folder with the program, the files that its firmware needs, and a test for this machine.

            program.package("firmware")        # then: cmake -B build && cmake --build build && ctest --test-dir build

        The folder holds the program as an array, sizes of memory, functions for inputs and outputs, the list of CPU
        kernels, test vectors, a main function, and a README.md with the steps for a board. The options are those of
        `openneutron.firmware.PackageOptions`: the name of the model in C, the test vectors, the tolerance, and the form
        and the section of the array.

        Raises `OptionError` for wrong options, `OutputError` for a folder that is not empty or cannot be written, and
        `InputError` for samples that do not fit. After an error, no files are left.
        """
        from openneutron.firmware import package

        return package(
            self.buffer,
            folder,
            portable=self.device_source,
            leaves=self.leaves,
            kernel_selection=self.kernel_selection,
            etrecord=self.etrecord,
            **options,
        )

    def to_model_explorer(
        self,
        folder: str | os.PathLike[str],
        quantized: QuantizedModel | None = None,
        analysis: LayerwiseAccuracy | None = None,
        name: str = "model",
    ) -> tuple[Path, ...]:
        """Writes files for Google's Model Explorer to `folder`, and returns their paths.

        graphs.json has a graph for each delegate and, with `quantized`, the ATen graph by modules. Further files hold
        node data: estimated cycles, bytes of weights, the processor of each operator, and, with `analysis`, the SQNR of
        each layer. Open them with `model-explorer FOLDER/graphs.json --node_data_paths=FOLDER/cycles.json`. `name` is
        the name of the model there.

        Raises `OutputError` if a file cannot be written, and `InputError` for a program without a delegate.
        """
        from openneutron.page import summarize
        from openneutron.page.model_explorer import write_model_explorer

        summary = summarize(name, self, quantized=quantized, analysis=analysis)
        module = None if quantized is None else quantized.reference or quantized.module
        return write_model_explorer(self.portable, summary, folder, module)

    @property
    def _loaded(self) -> HostProgram:
        """The program on this machine. All threads get the same one, which has the state."""
        with _LOADING:
            return self._host_program

    @functools.cached_property
    def _host_program(self) -> HostProgram:
        return HostProgram(self.portable, leaves=self.leaves)

    def __getstate__(self) -> dict[str, Any]:
        """Returns the fields for pickling. The loaded program is left out, because it belongs to this process."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def estimate(self, target: Target | None = None) -> Estimate:
        """Estimates the cycles of the NPU and the bytes of scratch memory and weights, by layer and in total.

        The estimate tells whether the program fits into the memory of `target`, a chip, a board or a board file, by
        default the program's own. It needs no vendor SDK, and it is not a measurement. Raises `TargetError` for an
        unknown target.
        """
        from openneutron.report.inspect import inspect_bytes

        return inspect_bytes(self.portable, "the program", target or self.board or self.target).estimate


def _named_value(name: str, value: pte.ProgramValue, leaf: Leaf | None = None) -> NamedValue:
    if leaf is not None and not leaf.is_tensor:
        return NamedValue.of_constant(name, leaf.constant)
    is_tensor = value.dtype in pte.SCALAR_TYPES.values() and value.constant is None
    return NamedValue(name, value.dtype, value.shape, is_tensor, value.constant)

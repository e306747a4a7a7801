"""Checks that ExecuTorch's CPU kernels support the operators that stay on the CPU, before a program is written.

The registry of ExecuTorch's runtime lists kernels by name. It lists neither the dtypes and ranks that a kernel supports
nor the operators that ExecuTorch decomposes. Where the registry does not suffice, the check lowers and runs operators
in a small program.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node, map_arg
from torch.utils._pytree import tree_leaves

from openneutron.core.boundary import error_at
from openneutron.core.evaluation import evaluate_call
from openneutron.core.fx import is_operator, modules_of, note, note_of, op_name, place_of
from openneutron.cpu.registry import RUNTIME, cause_in, kernel_names, missing_kernels, native_log
from openneutron.cpu.signatures import signature_of
from openneutron.errors import FormatError, ModelError
from openneutron.formats import pte_check
from openneutron.ops import OPERATORS

__all__ = ["check_cpu_kernels"]

Left = tuple[Node, str]
"""An operator that stays on the CPU, and the reason why it is not on the NPU."""

_CHECKED = "openneutron.has_cpu_kernel"
_USUAL_DTYPES = {torch.float32, torch.int64, torch.int32, torch.bool}
_USUAL_RANK = 4
# Names of out variants by overload. Other out variants are named by the overload and "_out".
_OUT = {"default": "out"}
# Operators of these namespaces have out variants in ExecuTorch, or ExecuTorch's passes replace them.
_NAMESPACES = {"aten", "prims", "quantized_decomposed", "dim_order_ops", "executorch_prims", "openneutron"}
_NO_OUT_VARIANT = (
    "ExecuTorch calls the out variant of an operator, and none is registered for this one. Register it with "
    "torch.library under the overload name 'out', and link its kernel into the runner."
)
LARGEST_TRIAL = 1 << 22
"""Operators with more elements than this, inputs and outputs together, are lowered but not run."""


def check_cpu_kernels(left: Iterable[Left], *, trusts_table: bool) -> None:
    """Raises `ModelError` if ExecuTorch's CPU kernels cannot run one of the operators `left`.

    With `trusts_table`, the check assumes kernels for the operators of `OPERATORS` with the usual dtypes and ranks. For
    an operator outside the namespace `aten`, the user links the kernel, so the check only requires that the operator
    has the out variant that ExecuTorch calls. A note on each operator that passed prevents a second check.
    """
    left = list(left)
    unwritable = [(node, reason, _NO_OUT_VARIANT) for node, reason in left if _lacks_out_variant(node)]
    if unwritable:
        raise _unsupported_error(unwritable)
    names = kernel_names()
    checked = [pair for pair in left if _needs_check(pair[0])]
    questions: dict[str, Left] = {}
    for node, reason in checked:
        if not _is_known(node, names, trusts_table=trusts_table):
            questions.setdefault(_kernel_key(node), (node, reason))
    found = list(questions.values())
    if found and _Trial([node for node, _ in found]).cause() is not None:
        causes = [(node, reason, _Trial([node]).cause()) for node, reason in found]
        refused = [(node, reason, cause) for node, reason, cause in causes if cause is not None]
        if refused:
            raise _unsupported_error(refused)
    for node, _ in checked:
        note(node, _CHECKED, True)


def _unsupported_error(refused: Sequence[tuple[Node, str, str]]) -> ModelError:
    node, reason, cause = refused[0]
    modules = modules_of(node)
    module = " of module '{}' ({})".format(*modules[-1]) if modules else ""
    others = "".join(f"\n  {other.name} ({op_name(other)}, {place_of(other)}): {why}" for other, _, why in refused[1:])
    return error_at(
        node,
        f"The operator {op_name(node)}{module} can run neither on the NPU nor on the CPU, so no program is written. "
        f"CPU: {cause} NPU: {reason} Write it with other operators, or compute it before or after the program."
        + (f" Other operators that can run on neither:{others}\n" if others else ""),
    )


def _lacks_out_variant(node: Node) -> bool:
    """Whether `node` calls a user-defined operator that has no out variant."""
    overload = node.target
    if not isinstance(overload, torch._ops.OpOverload) or overload.namespace in _NAMESPACES or note_of(node, _CHECKED):
        return False
    packet = overload.overloadpacket
    schemas = [getattr(packet, name)._schema for name in packet.overloads()]
    return not any(argument.is_out for schema in schemas for argument in schema.arguments)


def _needs_check(node: Node) -> bool:
    if not is_operator(node) or note_of(node, _CHECKED) or not op_name(node).startswith("aten."):
        return False
    values = _tensors_of(node)
    return bool(values) and all(_example_size(size) is not None for value in values for size in value.shape)


def _example_size(size: int | torch.SymInt) -> int | None:
    """Returns a size, or the size in the example inputs of a dynamic one; None if it depends on values."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else None


def _tensors_of(node: Node) -> list[torch.Tensor]:
    """Returns the tensors among the inputs and outputs of `node`."""
    nodes = [node, *node.all_input_nodes]
    return [value for each in nodes for value in tree_leaves(each.meta.get("val")) if isinstance(value, torch.Tensor)]


def _is_known(node: Node, names: frozenset[str], *, trusts_table: bool) -> bool:
    """Whether the operator has the usual dtypes and ranks, and a kernel with its name or an entry in `OPERATORS`.

    ExecuTorch rejects an operator outside of Core ATen, unless torch decomposes it, even if there is a kernel.
    """
    spec, values = OPERATORS.get(op_name(node)), _tensors_of(node)
    if any(value.dtype not in _USUAL_DTYPES for value in values):
        return False
    if spec is not None and spec.moves_values:
        return True
    if any(value.dim() > _USUAL_RANK for value in values) or _has_negative_numbers(node):
        return False
    _, name, overload = op_name(node).split(".")
    if trusts_table and spec is not None:
        return True
    return f"aten::{name}.{_OUT.get(overload, f'{overload}_out')}" in names and _is_core_or_decomposed(node)


def _is_core_or_decomposed(node: Node) -> bool:
    """Whether the operator is part of Core ATen, or torch decomposes it in every export."""
    overload = node.target
    if not isinstance(overload, torch._ops.OpOverload):
        return False
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return torch.Tag.core in overload.tags or has_kernel(overload.name(), "CompositeImplicitAutograd")


def _has_negative_numbers(node: Node) -> bool:
    """Whether a list among the arguments holds a negative number, such as the widths of a pad that crops."""
    lists = [value for value in node.args if isinstance(value, (list, tuple))]
    return any(isinstance(number, int) and number < 0 for value in lists for number in value)


def _kernel_key(node: Node) -> str:
    """Returns a key of name, dtypes, ranks and constant arguments. A kernel supports all operators of a key or none."""
    kinds = [(str(value.dtype), value.dim()) for value in _tensors_of(node)]
    return f"{op_name(node)} {kinds} {map_arg((node.args, node.kwargs), lambda _: None)}"


@dataclass(frozen=True)
class _Trial:
    """Lowers `nodes` as a small program and runs it on zeros and ones."""

    nodes: Sequence[Node]

    def cause(self) -> str | None:
        """Returns the reason why ExecuTorch cannot run `nodes`; None if it can, or if torch cannot export them."""
        complex_dtypes = {str(v.dtype) for node in self.nodes for v in _tensors_of(node) if v.is_complex()}
        if complex_dtypes:
            return f"ExecuTorch's kernels do not support complex numbers ({', '.join(sorted(complex_dtypes))})."
        inputs, module = self._trial_module()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                exported = torch.export.export(module, inputs)
            except Exception:
                return None
            return self._write_failure(exported, inputs)

    def _write_failure(self, exported: torch.export.ExportedProgram, inputs: tuple[torch.Tensor, ...]) -> str | None:
        from executorch.exir import to_edge

        try:
            buffer = bytes(to_edge(exported).to_executorch().buffer)
        except Exception as error:
            return f"ExecuTorch cannot lower it: {_first_sentence(str(error))}."
        if missing := missing_kernels(buffer):
            return f"ExecuTorch has no kernel {', '.join(missing)}."
        try:
            pte_check.check(buffer, signature_of, "its program")
        except FormatError as error:  # such as complex numbers between real inputs and outputs
            return f"The host does not load it: {error}."
        return self._run_failure(buffer, inputs) if self._element_count() <= LARGEST_TRIAL else None

    def _run_failure(self, buffer: bytes, inputs: tuple[torch.Tensor, ...]) -> str | None:
        from executorch.extension.pybindings import _C

        with RUNTIME, native_log() as log:
            try:
                _C._load_program_from_buffer(buffer).load_method("forward").call(list(inputs))
            except RuntimeError:
                operator, cause = cause_in(log())
            else:
                return None
        kernel = f"The kernel {operator}" if operator else "ExecuTorch's kernel"
        taken = ", ".join(dict.fromkeys(f"{str(v.dtype)[6:]} of rank {v.dim()}" for v in _tensors_of(self.nodes[0])))
        return f"{kernel} does not support it ({cause or 'for ' + taken})."

    def _element_count(self) -> int:
        sizes = (map(_example_size, value.shape) for node in self.nodes for value in _tensors_of(node))
        return sum(math.prod(size or 0 for size in shape) for shape in sizes)

    def _trial_module(self) -> tuple[tuple[torch.Tensor, ...], torch.nn.Module]:
        operands = list(dict.fromkeys(value for node in self.nodes for value in node.all_input_nodes))
        tensors = [value for value in operands if isinstance(value.meta.get("val"), torch.Tensor)]
        inputs = tuple(_example_tensor(value.meta["val"]) for value in tensors)
        return inputs, _Calls(self.nodes, tensors)


def _example_tensor(value: torch.Tensor) -> torch.Tensor:
    """Returns ones for a float tensor and zeros for an integer tensor, because 0 is a valid index of any dimension."""
    make = torch.ones if value.is_floating_point() else torch.zeros
    return make([_example_size(size) or 0 for size in value.shape], dtype=value.dtype)


def _first_sentence(text: str) -> str:
    return " ".join(text.split()).partition(" (http")[0].partition(". ")[0].rstrip(".")[:300]


class _Calls(torch.nn.Module):
    """Calls each operator of `nodes` on the tensors that it reads. Operators do not read each other's results."""

    def __init__(self, nodes: Sequence[Node], tensors: Sequence[Node]) -> None:
        super().__init__()
        self._nodes, self._tensors = tuple(nodes), tuple(tensors)

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given: dict[Node, Any] = dict(zip(self._tensors, values, strict=True))

        def read(value: Node) -> Any:
            return given[value] if value in given else _example_size(value.meta["val"])

        results: list[torch.Tensor] = []
        for node in self._nodes:
            leaves = tree_leaves(evaluate_call(node, read))
            results += [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        return tuple(results)

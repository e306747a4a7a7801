"""Adds checks of the model's inputs that raise `InputError` with the expected dtype, shape and indices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from openneutron.data.shape_advice import size_advice
from openneutron.errors import InputError
from openneutron.ops.index_limits import IndexLimit, index_limits

__all__ = ["GUARDS", "InputCheck", "add_input_guards", "check_inputs_before_observers"]

# The submodule in which torch.export leaves its own check of the input shapes.
GUARDS = "_guards_fn"


@dataclass(frozen=True)
class _ConstantInput:
    """An input that is a constant: the number, text or None with which the model was exported."""

    name: str
    value: int | float | bool | str | None

    def accepts(self, value: object) -> bool:
        """Returns whether `value` equals the constant."""
        return type(value) is type(self.value) and value == self.value

    def __str__(self) -> str:
        return repr(self.value)


@dataclass(frozen=True)
class _TensorInput:
    """The dtype and shape of an input tensor. A size that the model does not fix is None."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | None, ...]
    """None for a size that the model does not fix."""
    limits: tuple[IndexLimit, ...] = ()
    """The limits of indices, for an input of integers that select values."""

    def check_indices(self, value: torch.Tensor) -> None:
        """Raises `InputError` if an index is out of range. A graph that is exported has no values to check."""
        if not self.limits or torch.compiler.is_compiling():
            return
        exceeded = next((limit for limit in self.limits if not limit.accepts(value)), None)
        if exceeded is None:
            return
        raise InputError(
            f"Input '{self.name}' has indices from {int(value.min())} to {int(value.max())}, but this operator takes "
            f"indices from {exceeded.first} to {exceeded.last}. Check the integers in the data, such as the token "
            "of an unknown word or of padding.",
            node=exceeded.node,
            op=exceeded.op,
            source=exceeded.source,
        )

    def accepts(self, value: object) -> bool:
        """Returns whether `value` is a tensor of this dtype and shape."""
        if not isinstance(value, torch.Tensor):
            return False
        sizes = zip(value.shape, self.shape, strict=False)
        same_sizes = all(fixed is None or size == fixed for size, fixed in sizes)
        return value.dtype == self.dtype and value.dim() == len(self.shape) and same_sizes

    def __str__(self) -> str:
        sizes = ["any" if size is None else str(size) for size in self.shape]
        return f"{self.dtype} ({', '.join(sizes)}{',' * (len(sizes) == 1)})"


class InputCheck(torch.nn.Module):
    """Raises `InputError` for an input of another shape or dtype, or for an index out of range.

    Then calls `guards`, the check that torch.export made.
    """

    def __init__(self, expected: tuple[_TensorInput | _ConstantInput | None, ...], guards: torch.nn.Module) -> None:
        super().__init__()
        self.expected = expected
        self.guards = guards
        self._is_impure = True  # keeps the call in the graph, although nothing reads its output

    def forward(self, *inputs: Any) -> None:
        """Checks the inputs, in the order of the graph's placeholders."""
        for value, expected in zip(inputs, self.expected, strict=True):
            if expected is None:
                continue
            if not expected.accepts(value):
                raise _input_error(value, expected)
            if isinstance(expected, _TensorInput):
                expected.check_indices(value)
        self.guards(*inputs)


@dataclass(frozen=True)
class _DtypeCheck:
    """A forward pre-hook that checks the dtype of an observed input. The observer may see other shapes."""

    expected: _TensorInput

    def __call__(self, _: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        """Raises `InputError` for a value that is not a tensor, or is a tensor of another dtype."""
        (value,) = inputs
        if not isinstance(value, torch.Tensor) or value.dtype != self.expected.dtype:
            raise _input_error(value, self.expected)


def _input_error(value: object, expected: _TensorInput | _ConstantInput) -> InputError:
    given = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
    wanted = "that value" if isinstance(expected, _ConstantInput) else "inputs of that dtype and shape"
    advice = ""
    if isinstance(value, torch.Tensor) and isinstance(expected, _TensorInput) and value.dtype == expected.dtype:
        advice = size_advice(value.shape, expected.shape)
    return InputError(
        f"Input '{expected.name}' is {given}; the model was exported for {expected}. Give {wanted}, or export the "
        f"model with inputs of the given kind.{advice}"
    )


def _expected_input(node: Node, value: object) -> _TensorInput | _ConstantInput | None:
    if isinstance(value, torch.Tensor):
        shape = tuple(size if isinstance(size, int) else None for size in value.shape)
        return _TensorInput(node.name, value.dtype, shape, index_limits(node))
    is_constant = "val" in node.meta and isinstance(value, (int, float, str, type(None)))
    return _ConstantInput(node.name, value) if is_constant else None  # type: ignore[arg-type]


def add_input_guards(module: GraphModule) -> bool:
    """Rule: the check of input shapes that torch.export adds raises `InputError`, and also checks dtypes and indices.

    A graph without that check is not changed. Linear in inputs.
    """
    guards = getattr(module, GUARDS, None)
    calls = [node for node in module.graph.nodes if node.op == "call_module" and node.target == GUARDS]
    if guards is None or isinstance(guards, InputCheck) or len(calls) != 1:
        return False
    values = [node.meta.get("val") for node in calls[0].args]
    expected = tuple(map(_expected_input, calls[0].args, values))
    delattr(module, GUARDS)
    module.add_module(GUARDS, InputCheck(expected, guards))
    return True


def check_inputs_before_observers(observers: Mapping[Any, Any]) -> None:
    """Adds a dtype check, which raises `InputError`, to the observers of inputs. Linear in `observers`.

    The keys of `observers` are nodes and edges (producer, consumer). torchao calls these observers before the check of
    all inputs.
    """
    for place, observer in observers.items():
        node = place if isinstance(place, Node) else place[0]
        expected = _expected_input(node, node.meta.get("val")) if node.op == "placeholder" else None
        if isinstance(observer, torch.nn.Module) and isinstance(expected, _TensorInput):
            observer.register_forward_pre_hook(_DtypeCheck(expected))

"""The result of `quantize`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_map

from openneutron.core.files import output_path, write_file
from openneutron.core.fx import is_dequantize, is_operator, is_quantize
from openneutron.core.locks import traces_alone
from openneutron.core.tables import ResultTable, ShownAsTable
from openneutron.errors import InputError, OptionError
from openneutron.model.arguments import Leaf, check_names, names_of_leaves, positions_of, with_argument_names
from openneutron.model.examples import Examples, leaves_of, to_tensors
from openneutron.model.exporting import export, saved_program
from openneutron.model.state import reset
from openneutron.recovery.recipes import Recipe
from openneutron.recovery.search import Trial
from openneutron.results.named_values import NamedValue
from openneutron.targets import NeutronTargetSpec

__all__ = ["QuantizedModel"]


@dataclass(frozen=True)
class QuantizedModel(ShownAsTable):
    """A converted model. `quantize` returns it, and `lower` takes it."""

    module: GraphModule
    """The result of `convert_pt2e`, a regular PyTorch model."""
    example_inputs: tuple[Any, ...]
    """The positional arguments that the model was exported with."""
    target: str
    """The name of the chip that the model was quantized for."""
    reference: GraphModule | None = field(default=None, repr=False)
    """The float graph that was annotated. It computes the values of `module` without rounding, under the same names."""
    recipe: Recipe | None = None
    """The recipe that was followed. `quantize(..., recover=recipe)` follows it again."""
    trials: tuple[Trial, ...] = field(default=(), repr=False)
    """With `recover="best"`, the recipes that were tried, in order."""
    example_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """The keyword arguments that the model was exported with."""
    parameters: frozenset[str] = field(default=frozenset(), repr=False)
    """Digests of the float model's parameters. `analyze` compares them with those of the model that it gets."""
    board: NeutronTargetSpec | None = field(default=None, repr=False)
    """The board, if `quantize` was given one. `lower` gives it to the program. `save` stores the name of a
    board that OpenNeutron has a file of, but not a board file."""

    @traces_alone
    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Runs the converted module on tensors or numpy arrays. Returns tensors. State is kept between calls.

        `named` are arguments of `forward`, or inputs by their positions: `input0`. Raises `InputError` for such an
        input that is given twice, or is a part of an argument.
        """
        named = self._by_arguments(inputs, named)
        return self.module(*tree_map(to_tensors, inputs), **tree_map(to_tensors, named))

    def _by_arguments(self, inputs: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the arguments by name, without positions."""
        if not named:
            return {}
        paths = [leaf.path for leaf in leaves_of(self.module)]
        positions = positions_of(paths, named)
        if not positions:
            return dict(named)
        check_names(paths, inputs, named, "The quantized model")
        for name, index in positions.items():
            if len(paths[index]) > 1:
                path = Leaf(paths[index])
                raise InputError(
                    f"The input '{name}' of the quantized model is '{path.name}', a part of the argument "
                    f"'{path.path[0]}'. Give the whole argument '{path.path[0]}'."
                )
        return with_argument_names(paths, named)

    def __str__(self) -> str:
        quantized, operators = self._operators()
        return (
            f"Quantized model for {self.target}: {quantized} of {operators} operators in int8\n"
            f"{''.join(f'  in  {one.name}: {one.content}' + chr(10) for one in self._inputs())}"
            f"  recovery: {self._recovery_text()}"
        )

    def as_table(self) -> ResultTable:
        """Returns the number of operators in int8, the inputs, and the recovery recipe."""
        quantized, operators = self._operators()
        recipe = self.recipe
        recovery = (
            [("recovery", "none")]
            if recipe is None
            else [(f"recovery: {one.name}", str(getattr(recipe, one.name))) for one in fields(recipe)]
        )
        rows = [
            ("operators in int8", f"{quantized} of {operators}"),
            *(("input", f"{one.name}: {one.content}") for one in self._inputs()),
            *recovery,
        ]
        return ResultTable(f"Quantized model for {self.target}", ("property", "value"), tuple(rows))

    def _recovery_text(self) -> str:
        if self.recipe is None:
            return "none"
        return ", ".join(f"{one.name} {getattr(self.recipe, one.name)}" for one in fields(self.recipe))

    def as_dict(self) -> dict[str, Any]:
        """Returns the target, the numbers of operators, the inputs and the recovery recipe as values that JSON has."""
        quantized, operators = self._operators()
        return {
            "target": self.target,
            "int8_operators": quantized,
            "operators": operators,
            "inputs": [value.as_dict() for value in self._inputs()],
            "recipe": None if self.recipe is None else asdict(self.recipe),
        }

    def _operators(self) -> tuple[int, int]:
        """Returns the number of operators in int8, and of all operators."""
        operators = [node for node in self.module.graph.nodes if _computes(node)]
        return sum(map(_is_quantized, operators)), len(operators)

    def _inputs(self) -> Iterator[NamedValue]:
        values = self.examples.leaves
        for name, value in zip(names_of_leaves(leaves_of(self.module), len(values)), values, strict=True):
            if isinstance(value, Tensor):
                yield NamedValue(name, str(value.dtype).removeprefix("torch."), tuple(value.shape))
            else:
                yield NamedValue.of_constant(name, value)

    @property
    def examples(self) -> Examples:
        """The positional and keyword arguments that the model was exported with."""
        return Examples(self.example_inputs, self.example_kwargs)

    def reset(self) -> None:
        """Restores the state that the module had when the model was exported."""
        reset(self.module)

    @traces_alone
    def as_file(self, source_root: str | os.PathLike[str] | None = None) -> bytes:
        """Returns the content of the file that `save` writes."""
        target = self.target if self.board is None else self.board.known_name
        return saved_program(export(self.module, self.examples), target, source_root)

    def save(self, path: str | os.PathLike[str], *, source_root: str | os.PathLike[str] | None = None) -> None:
        """Exports the converted module and writes it to `path`, a file of torch.export (.pt2) that `lower` takes.

        The file holds the name of the chip, or of a board that OpenNeutron has a file of. It does not hold a board
        file: give that to `lower` again. Nor does it hold the float model, which `analyze` needs again.
        The user's source lines in it are relative to `source_root`, by default the current folder.
        Raises `OutputError` if the file cannot be written, and `OptionError` for another suffix than .pt2.
        """
        if output_path(path).suffix != ".pt2":
            raise OptionError(f"A quantized model is saved as .pt2, but the path is '{os.fspath(path)}'.")
        write_file(path, self.as_file(source_root))


def _computes(node: Node) -> bool:
    return is_operator(node) and not is_quantize(node) and not is_dequantize(node)


def _is_quantized(node: Node) -> bool:
    """Whether an operator has an int8 input or output. A fused activation has only an int8 output."""
    return any(map(is_dequantize, node.all_input_nodes)) or any(map(is_quantize, node.users))

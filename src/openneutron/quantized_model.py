"""The result of `quantize`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch.fx import GraphModule
from torch.utils._pytree import tree_map

from openneutron.core.files import output_path, write_file
from openneutron.core.locks import traces_alone
from openneutron.errors import OptionError
from openneutron.model.examples import Examples, to_tensors
from openneutron.model.exporting import export, saved_program
from openneutron.model.state import reset
from openneutron.recovery.recipes import Recipe
from openneutron.recovery.search import Trial
from openneutron.targets import NeutronTargetSpec

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["QuantizedModel"]


@dataclass(frozen=True)
class QuantizedModel:
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
        """Runs the converted module on tensors or numpy arrays. Returns tensors. State is kept between calls."""
        return self.module(*tree_map(to_tensors, inputs), **tree_map(to_tensors, named))

    def __str__(self) -> str:
        from openneutron.report.summary import summary_of_model

        return summary_of_model(self)

    def _repr_html_(self) -> str:
        from openneutron.report.tables import model_table

        return model_table(self).as_html()

    def __rich__(self) -> Table:
        from openneutron.report.tables import model_table

        return model_table(self).as_rich()

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

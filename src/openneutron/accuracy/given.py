"""The quantized model and the data that a user gives to `analyze` and `compare_layers`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.export import ExportedProgram
from torch.fx import GraphModule

from openneutron.core.boundary import typed_errors
from openneutron.errors import InputError, ModelError
from openneutron.model.data import Data, Inputs, first_steps, forms_of, streams_in
from openneutron.model.exporting import is_quantized
from openneutron.quantized_model import QuantizedModel

__all__ = ["Given", "given"]


@dataclass(frozen=True)
class Given:
    """A quantized model, its converted module, and the steps of each stream of data."""

    quantized: QuantizedModel | GraphModule
    module: GraphModule
    streams: list[list[Inputs]]

    @property
    def first(self) -> Inputs:
        """The inputs of the first step."""
        return next(steps[0] for steps in self.streams if steps)


def given(
    quantized: QuantizedModel | GraphModule | ExportedProgram,
    data: Data,
    samples: int,
    transform: Callable[[Any], Any] | None,
) -> Given:
    """Reads the first `samples` of `data`, in the forms that the module takes.

    Raises `ModelError` for a module without quantized layers, and `InputError` for data that do not fit or are empty.
    """
    found = quantized.module() if isinstance(quantized, ExportedProgram) else quantized
    module = found.module if isinstance(found, QuantizedModel) else found
    if not is_quantized(module):
        raise ModelError(
            f"This {type(module).__name__} has no quantized layer. Give a result of quantize() or convert_pt2e as "
            "`quantized`."
        )
    with typed_errors("Reading the data", InputError):
        streams = first_steps(streams_in(data, forms_of(module), transform=transform), samples)
    if not any(streams):
        raise InputError("The data are empty. Give at least one input, or better 16.")
    return Given(found, module, streams)

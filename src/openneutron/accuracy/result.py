"""What an analysis found: plain data, as text, as JSON, and as a page with plots."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from openneutron.accuracy.compare import Comparison
from openneutron.core.files import write_file

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Advice", "Analysis", "Bins", "LayerAccuracy"]


@dataclass(frozen=True)
class Bins:
    """A histogram of a layer's output from `low` to `high`: counts of float values and of dequantized ones."""

    low: float
    high: float
    reference: tuple[int, ...]
    quantized: tuple[int, ...]


@dataclass(frozen=True)
class LayerAccuracy:
    """One quantized layer: an operator and what is fused into it, an input, or a requantization.

    Ranges are (lowest, highest); decibels are of energies summed over all samples, infinite without noise.
    """

    node: str
    """Name of the operator's node in the quantized module."""
    op: str
    """Its operator ("aten.conv2d.default"); "input" and "requantize" where a value is only quantized."""
    activation: str | None
    """The activation that is fused into it."""
    module: str | None
    """Name of the innermost module that calls it, as `layers` takes it, where known."""
    source: str | None
    """The user's "file:line", where known."""
    position: int
    """Its place along the network, from 0."""
    sqnr_db: float
    """Its output beside that of the float graph: with the noise of all layers before it."""
    own_sqnr_db: float
    """Its output beside that of the same layer in float on the same quantized inputs: its own noise alone."""
    error_share: float | None
    """The share of the final error that disappears with this layer alone in float: below 0 where its error had
    cancelled another. None where it was not measured."""
    float_range: tuple[float, float]
    """Of its output in the float graph."""
    int8_range: tuple[float, float]
    """What its output's codes reach."""
    fixed_range: bool
    """Whether its operator dictates that range, and no observer has a say."""
    saturation: float
    """Share of its float values that lie outside the codes' range, 0 to 1."""
    channels: int
    """Of its output."""
    dead_channels: int
    """Channels of its output that are constant in float, over all samples."""
    lost_channels: int
    """Channels that are not, and of which int8 leaves one code."""
    weight_range: tuple[float, float] | None
    """Of its float weight; None, as the next ones, for a layer without a quantized weight."""
    weight_scales: tuple[float, float] | None
    """The smallest and the largest scale of its weight."""
    weight_channels: int | None
    """Output channels of its weight."""
    weak_channels: int | None
    """Those of them that have fewer than 8 of 255 codes."""
    can_be_per_channel: bool
    """Whether its weight has one scale now, and its operator takes one for each channel."""
    histogram: Bins
    largest_codes: tuple[int, ...]
    """The largest absolute code of each output channel of its weight."""


@dataclass(frozen=True)
class Advice:
    """What to try at one layer."""

    node: str
    module: str | None
    why: str
    """What is wrong, with its numbers."""
    what: str
    """What to try."""
    code: str
    """The option of `quantize()` or `NeutronQuantizer()` to paste."""
    removes: float | None
    """The share of the final error that this removed when it was tried on the samples, where it was."""


@dataclass(frozen=True)
class Analysis:
    """Where a quantized model loses accuracy. `print(analysis)` is for people; see `table`, `to_json`, `save_html`."""

    layers: tuple[LayerAccuracy, ...]
    """Sorted: the largest share of the error first, then what was not measured; within these the lowest SQNR first."""
    output_sqnr_db: float
    """Of the model's outputs; of several, their noise-to-signal ratios are averaged."""
    weights_sqnr_db: float
    """The same with weights and biases alone quantized, activations in float."""
    activations_sqnr_db: float
    """The same with activations alone quantized: about as much as other weights could keep."""
    samples: int
    share_samples: int
    """How many of the samples the shares were measured on."""
    verdict: str
    """In a sentence, whether anything is to be treated."""
    advice: tuple[Advice, ...]
    """The one or two layers to treat; empty where there is nothing to treat, or no one layer to blame."""
    comparison: Comparison | None = None
    """The module beside the program that was given, layer by layer; None where none was given."""

    def __str__(self) -> str:
        from openneutron.accuracy.text import text_of

        return text_of(self)

    def table(self, limit: int | None = None) -> Table:
        """A row for each layer, in the order of `layers`; at most `limit` of them."""
        from openneutron.accuracy.text import table_of

        return table_of(self, limit)

    def to_json(self) -> str:
        """All of it as JSON; what is infinite is null."""
        return json.dumps(_finite(asdict(self)), indent=1, allow_nan=False)

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON. Raises `OutputError` where that cannot be done."""
        write_file(path, self.to_json().encode())

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write one page with the table and plots, which needs nothing but a browser.

        Raises `OutputError` where that cannot be done, `OptionError` where plotly is not installed.
        """
        from openneutron.accuracy.html import page_of

        write_file(path, page_of(self).encode())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

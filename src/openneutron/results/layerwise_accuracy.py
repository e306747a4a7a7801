"""The accuracy of a quantized model, layer by layer, as data. `analyze` measures it."""

from __future__ import annotations

from dataclasses import dataclass

from openneutron.results.comparison import Comparison

__all__ = ["Advice", "Bins", "Gain", "LayerAccuracy", "LayerwiseAccuracy", "RecurrentAccuracy"]


@dataclass(frozen=True)
class Bins:
    """Counts of the float and of the dequantized values of a layer's output, in equal bins from `low` to `high`."""

    low: float
    """Lower end of the first bin."""
    high: float
    """Upper end of the last bin."""
    reference: tuple[int, ...]
    """Number of float values in each bin."""
    quantized: tuple[int, ...]
    """Number of dequantized values in each bin."""


@dataclass(frozen=True)
class LayerAccuracy:
    """The accuracy of a quantized layer: an operator with its fused activation, an input, or a requantization.

    Ranges are (lowest, highest). SQNRs in dB are ratios of energies summed over all samples; infinite without noise.
    """

    node: str
    """Name of the layer's node in the quantized module."""
    op: str
    """Its operator ("aten.conv2d.default"), or "input" or "requantize" for a layer without an operator."""
    activation: str | None
    """Its fused activation; None if there is none."""
    module: str | None
    """Name of the innermost module that calls it, as the option `layers` takes it; None if unknown."""
    source: str | None
    """The user's "file:line"; None if unknown."""
    position: int
    """Index in graph order, from 0."""
    sqnr_db: float
    """SQNR of its output against the float graph. Includes the noise of all layers before it."""
    own_sqnr_db: float
    """SQNR of its output against the same layer in float on the same quantized inputs. Includes only its own noise."""
    error_share: float | None
    """The share of the final error that disappears if this layer alone is in float; None if not measured.

    It is below 0 if the layer's error cancels the error of other layers.
    """
    float_range: tuple[float, float]
    """Range of its output in the float graph."""
    int8_range: tuple[float, float]
    """Range of its output's codes, dequantized."""
    fixed_range: bool
    """Whether its operator fixes the int8 range, independently of observers."""
    saturation: float
    """Share of its float values outside of the int8 range, 0 to 1."""
    channels: int
    """Number of channels of its output."""
    dead_channels: int
    """Number of channels of its output that are constant in float, over all samples."""
    lost_channels: int
    """Number of channels that vary in float but have a single code in int8."""
    weight_range: tuple[float, float] | None
    """Range of its float weight. This field and the next three are None for a layer without a quantized weight."""
    weight_scales: tuple[float, float] | None
    """The smallest and the largest scale of its weight."""
    weight_channels: int | None
    """Number of output channels of its weight."""
    weak_channels: int | None
    """Number of output channels of its weight that use fewer than 8 of 255 codes."""
    can_be_per_channel: bool
    """Whether its weight has a single scale, and its operator supports a scale for each channel."""
    histogram: Bins
    largest_codes: tuple[int, ...]
    """The largest absolute code of each output channel of its weight."""
    weights_sqnr_db: float
    """SQNR of its output with only weights and biases quantized, in all layers up to it."""
    activations_sqnr_db: float
    """SQNR of its output with only activations quantized, in all layers up to it."""


@dataclass(frozen=True)
class Advice:
    """A remedy for one layer."""

    node: str
    """Name of the layer's node."""
    module: str | None
    why: str
    """The cause of the error, with numbers."""
    what: str
    """The remedy in words."""
    code: str
    """The option of `quantize()` or `NeutronQuantizer()` that applies the remedy, as Python code."""
    error_reduction: float | None
    """The share of the final error that the remedy removes on the samples; None if it was not tried."""

    @property
    def removes(self) -> float | None:
        """Deprecated: the former name of `error_reduction`."""
        return self.error_reduction


@dataclass(frozen=True)
class Gain:
    """An option of `quantize`, and the SQNR in dB that it gains."""

    code: str
    """The option of `quantize()`, or the call, as Python code."""
    gain_db: float | None
    """The increase of the SQNR of the outputs in dB on the samples, in the sense of `how`."""
    how: str
    """Whether the gain was measured or simulated, or is an upper limit, and of what."""


@dataclass(frozen=True)
class RecurrentAccuracy:
    """The accuracy of all steps of one recurrent layer together. Gains are increases of the SQNR of the outputs in dB.

    Gains of parts need not add up to the gain of the whole layer.
    """

    modules: tuple[str, ...]
    """Names of the modules that read its recurrent weights, as the options `layers` and `wide` take them."""
    number: int | None
    """Its number among the recurrent layers of these modules, from 1 in graph order; None if it is the only one."""
    steps: int
    """Number of its steps."""
    error_share: float | None
    """The share of the squared error that disappears if all its steps are in float; None if there is no error."""
    gain_db: float
    """With the whole layer in float."""
    states_gain_db: float
    """With the values that a step passes to the next one in float."""
    gates_gain_db: float
    """With all other activations of its steps in float."""
    weights_gain_db: float
    """With its weights and biases in float."""
    step_sqnr_db: tuple[float, ...]
    """SQNR of the output of each step, in the order of the steps."""
    nodes: tuple[str, ...]
    """Names of its layers, as in `LayerAccuracy.node`."""
    gains: tuple[Gain, ...]
    """The gains of options, the largest first, and training last."""

    @property
    def name(self) -> str:
        """The names of its modules, and its number if there is one."""
        modules = " and ".join(f"'{module}'" for module in self.modules)
        return modules if self.number is None else f"{modules} (number {self.number})"


@dataclass(frozen=True)
class LayerwiseAccuracy:
    """The accuracy of a quantized model, layer by layer. Its subclass `Analysis` shows and saves it."""

    layers: tuple[LayerAccuracy, ...]
    """Layers with a measured share of the error first, by descending share, then the others.

    Ties: lowest SQNR first.
    """
    output_sqnr_db: float
    """SQNR of the model's outputs, from the mean noise-to-signal ratio of the outputs."""
    weights_sqnr_db: float
    """SQNR of the outputs with only weights and biases quantized."""
    activations_sqnr_db: float
    """SQNR of the outputs with only activations quantized. Better quantization of weights can reach about this SQNR."""
    samples: int
    """Number of samples of the analysis."""
    share_samples: int
    """Number of samples on which the shares were measured."""
    verdict: str
    """One or two sentences about the SQNR of the outputs and the layers to treat."""
    advice: tuple[Advice, ...]
    """Remedies for the one or two layers to treat; empty if treating single layers does not help."""
    comparison: Comparison | None = None
    """Comparison of module and program, layer by layer; None without a program."""
    recurrent: tuple[RecurrentAccuracy, ...] = ()
    """The recurrent layers whose steps are unrolled, the largest share of the error first."""

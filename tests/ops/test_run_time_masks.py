"""Attention masks computed at run time: as accurate as constant masks, with the attention in one delegate."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.fidelity import signal_to_noise
from tests.flow_support import convert, lower_documented, seeded
from tests.oracle import Function
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

from openneutron import NeutronProgram, NeutronQuantizer, lower, quantize
from openneutron.accuracy import analyze
from openneutron.errors import CalibrationError
from openneutron.quantizer import UnquantizedWarning

LENGTH, FEATURES, HEADS = 8, 16, 2
LOWEST = torch.finfo(torch.float32).min
CAUSAL = torch.ones(LENGTH, LENGTH).tril().bool()
# Operators that may compute a mask from an input on the CPU, on tensors of the size of the mask.
CPU = (
    "view_copy", "expand", "_to_dim_order_copy", "bitwise_", "__and__", "eq.", "lt.", "ge.", "where.", "masked_fill.",
    "sub.", "rsub.", "mul.", "minimum.", "logical_", "add.",
)  # fmt: skip

Inputs = tuple[torch.Tensor, ...]
Masked = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Attention(nn.Module):
    """Self-attention with two heads. `mask` computes the softmax input from scores [B, H, T, T] and a mask."""

    def __init__(self, mask: Masked | None, choose: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        super().__init__()
        self.mask, self.choose = mask, choose
        self.query, self.key, self.value = (nn.Linear(FEATURES, FEATURES) for _ in range(3))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Computes on x [B, T, FEATURES]."""
        layers = (self.query, self.key, self.value)
        query, key, value = (layer(x).view(len(x), LENGTH, HEADS, -1).transpose(1, 2) for layer in layers)
        query = query * 3
        if self.choose is not None:
            seen = F.scaled_dot_product_attention(query, key, value, attn_mask=self.choose(mask))
        else:
            assert self.mask is not None
            scores = query @ key.transpose(-1, -2) / math.sqrt(FEATURES / HEADS)
            seen = self.mask(scores, mask).softmax(-1) @ value
        return seen.transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class Spelling:
    """A form in which a model applies a mask: by a function of scores and mask, or by an argument
    of torch's attention.
    """

    label: str
    kind: str
    mask: Masked | None = None
    choose: Callable[[torch.Tensor], torch.Tensor] | None = None

    def model(self) -> nn.Module:
        return seeded(lambda: Attention(self.mask, self.choose))


def _inverted(mask: torch.Tensor) -> torch.Tensor:
    inverted = 1.0 - mask[:, None, None].expand(-1, 1, LENGTH, -1).float()
    return inverted.masked_fill(inverted.bool(), LOWEST)


BIAS = torch.linspace(-2, 2, LENGTH).expand(LENGTH, -1) * torch.linspace(-1, 1, LENGTH)[:, None]

SPELLINGS = (
    Spelling("masked_fill -inf", "bool", lambda s, m: s.masked_fill(~m[:, None, None], -math.inf)),
    Spelling("masked_fill -1e9", "int", lambda s, m: s.masked_fill(m[:, None, None] == 0, -1e9)),
    Spelling("masked_fill -999", "float", lambda s, m: s.masked_fill(m[:, None, None] == 0, -999.0)),
    Spelling("views after it", "int", lambda s, m: s.masked_fill(m[:, None, None] == 0, -1e4).flatten(0, 1).view_as(s)),
    Spelling("where scores", "bool", lambda s, m: torch.where(m[:, None, None], s, LOWEST)),
    Spelling("where numbers", "bool", lambda s, m: torch.where(~m[:, None, None], torch.full_like(s, -1e4), s)),
    Spelling("and causal", "bool", lambda s, m: s.masked_fill(~(CAUSAL & m[:, None, None]), -math.inf)),
    Spelling("lengths", "length", lambda s, m: s.masked_fill(torch.arange(LENGTH) >= m[:, None, None, None], -1e9)),
    Spelling("BERT", "int", lambda s, m: s + (1.0 - m[:, None, None].float()) * -10000.0),
    Spelling("BERT of floats", "float", lambda s, m: s + (m[:, None, None] - 1) * -LOWEST),
    Spelling("BERT of integers", "int", lambda s, m: s + ((1 - m) * -10000)[:, None, None]),
    Spelling("inverted", "int", lambda s, m: s + _inverted(m)),
    Spelling("sum", "-1e4", lambda s, m: s + m[:, None, None]),
    Spelling("sum -inf", "-inf", lambda s, m: m[:, None, None] + s),
    Spelling("sum of the lowest", "lowest", lambda s, m: (s + m[:, None, None]).masked_fill(~CAUSAL, -math.inf)),
    Spelling("sum of -100", "-100", lambda s, m: s + torch.linspace(-2, 2, LENGTH) + m[:, None, None]),
    Spelling("a bias after it", "-inf", lambda s, m: s + m[:, None, None] + BIAS),
    Spelling("a bias in it", "-inf", lambda s, m: s + (m[:, None, None] + BIAS)),
    Spelling("a bias before and after it", "-1e4", lambda s, m: (BIAS + s + m[:, None, None]) + BIAS[0]),
    Spelling("twice", "-inf", lambda s, m: s + m[:, None, None] + m[:, None, None]),
    Spelling("scaled fill", "bool", lambda s, m: s.mul(3).masked_fill(~m[:, None, None], -1e4) * 0.3),
    Spelling("divided fill of -inf", "bool", lambda s, m: s.mul(3).masked_fill(~m[:, None, None], -math.inf) / 3),
    Spelling("divided", "int", lambda s, m: torch.where(m[:, None, None] == 0, LOWEST, s * 2).squeeze(0).div(2)[None]),
    Spelling("scaled BERT", "int", lambda s, m: (s * 2.8 + (1.0 - m[:, None, None].float()) * -10000.0) / 2.8),
    Spelling("scaled sum", "-1e4", lambda s, m: (s * 3 + m[:, None, None]) * 0.35),
    Spelling("truth values", "bool", choose=lambda m: m[:, None, None]),
    Spelling("lengths of attention", "length", choose=lambda m: torch.arange(LENGTH) < m[:, None, None, None]),
    Spelling("additions", "lowest", choose=lambda m: m[:, None, None]),
    Spelling("infinite additions", "-inf", choose=lambda m: m[:, None, None].expand(-1, HEADS, LENGTH, -1)),
    Spelling("integers as truth values", "bool", choose=lambda m: m.int()[:, None, None].bool()),
    Spelling("truth values as integers", "bool", lambda s, m: s + (1 - m.int()[:, None, None]).float() * -1e9),
    Spelling("integers less one", "bool", lambda s, m: s + (m.long() - 1)[:, None, None] * 1e9),
    Spelling("bytes", "bool", lambda s, m: s.masked_fill(m.byte()[:, None, None].logical_not(), -1e9)),
    Spelling("a difference", "bool", lambda s, m: s - 1e9 * (1 - m[:, None, None].to(torch.int32))),
    Spelling("in the dtype of the scores", "bool", lambda s, m: s + (~m[:, None, None]).type_as(s) * -1e9),
    Spelling("product of integers", "bool", lambda s, m: s.masked_fill((m.int() * m.long())[:, None, None] == 0, -1e9)),
)


def mask_of(kind: str, visible: int) -> torch.Tensor:
    """Returns a padding mask [1, LENGTH] that shows the first `visible` keys, in the model's form; [1] for a length."""
    keep = (torch.arange(LENGTH) < visible)[None]
    if kind in ("bool", "int", "float"):
        return keep.to({"bool": torch.bool, "int": torch.int64, "float": torch.float32}[kind])
    if kind == "length":
        return torch.tensor([visible])
    return torch.zeros(1, LENGTH).masked_fill(~keep, LOWEST if kind == "lowest" else float(kind))


def samples(kind: str, *, hides: bool = True, count: int = 16) -> list[Inputs]:
    """Returns sequences with padding of several lengths, or without padding."""
    generator = torch.Generator().manual_seed(1)
    lengths = [3 + index % (LENGTH - 2) if hides else LENGTH for index in range(count)]
    return [(torch.randn(1, LENGTH, FEATURES, generator=generator), mask_of(kind, length)) for length in lengths]


def check(program: NeutronProgram) -> None:
    """Checks that the attention is in one delegate, and that the CPU only computes the mask."""
    left = [row.op for row in program.placement if row.where == "cpu"]
    assert not [op for op in left if not op.split("aten.")[-1].split("dim_order_ops.")[-1].startswith(CPU)], left
    assert {row.partition for row in program.placement if row.where == "npu"} == {0}


def quantized_program(
    model: nn.Module, inputs: Sequence[Inputs], recover: str | None = None, **options: Any
) -> NeutronProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnquantizedWarning)
        return lower(quantize(model, inputs[0], inputs, recover=recover, progress=False, **options))


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.label)
def test_masked_values(spelling: Spelling) -> None:
    """Hidden keys have no effect, also if no key was hidden in calibration."""
    model, padded = spelling.model(), samples(spelling.kind)
    program = quantized_program(model, samples(spelling.kind, hides=len(spelling.label) % 2 == 0))
    check(program)
    assert signal_to_noise(program.run, model, padded) >= 24
    x, mask = padded[0]
    visible, other = 3, x.clone()
    other[:, visible:] = 2.0
    run = (torch.as_tensor(program.run(value, mask)) for value in (x, other))
    first, second = (out[0] if out.dim() == 4 else out for out in run)
    assert torch.equal(first[:, :visible], second[:, :visible])


def test_a_run_time_mask_is_as_accurate_as_a_constant_mask() -> None:
    for spelling in (SPELLINGS[0], SPELLINGS[8], SPELLINGS[12], SPELLINGS[15]):
        model, padded = spelling.model(), samples(spelling.kind)
        mask = mask_of(spelling.kind if spelling.kind != "-100" else "-1e4", 5)
        fixed = Function(lambda model, mask, x: model(x, mask), model, mask).eval()
        alone, both = [(x,) for x, _ in padded], [(x, mask) for x, _ in padded]
        constant = signal_to_noise(quantized_program(fixed, alone).run, fixed, alone)
        at_run_time = signal_to_noise(quantized_program(model, padded).run, model, both)
        assert at_run_time >= constant - 3, spelling.label


class Layer(nn.Module):
    """A transformer layer of torch with a causal mask and a padding mask, which is true for padding.

    With `hidden`, the padding mask becomes floats first: this number where it is true.
    """

    def __init__(self, layer: nn.Module, causal: torch.Tensor | None = None, hidden: float | None = None) -> None:
        super().__init__()
        self.layer, self.causal, self.hidden = layer, causal, hidden

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        """Computes on x [B, T, FEATURES]."""
        if self.hidden is not None:
            padding = torch.zeros(padding.shape).masked_fill(padding, self.hidden)
        if isinstance(self.layer, nn.TransformerDecoderLayer):
            decoded: torch.Tensor = self.layer(
                x, x.tanh(), self.causal, tgt_key_padding_mask=padding, memory_key_padding_mask=padding
            )
            return decoded
        if isinstance(self.layer, nn.MultiheadAttention):
            attended: torch.Tensor = self.layer(x, x, x, key_padding_mask=padding, attn_mask=self.causal)[0]
            return attended
        encoded: torch.Tensor = self.layer(x, src_mask=self.causal, src_key_padding_mask=padding)
        return encoded


def _encoder(*, norm_first: bool = False) -> nn.Module:
    return nn.TransformerEncoderLayer(FEATURES, HEADS, 32, 0.0, batch_first=True, norm_first=norm_first)


LAYERS: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "encoder": (lambda: Layer(_encoder()), None),
    "encoder, causal": (lambda: Layer(_encoder(norm_first=True), ~CAUSAL), "auto"),
    "attention with weights": (
        lambda: Layer(nn.MultiheadAttention(FEATURES, HEADS, batch_first=True), ~CAUSAL),
        "fast",
    ),
    "attention with a bias": (
        lambda: Layer(nn.MultiheadAttention(FEATURES, HEADS, batch_first=True), BIAS.clone(), -math.inf),
        "auto",
    ),
    "decoder": (lambda: Layer(nn.TransformerDecoderLayer(FEATURES, HEADS, 32, 0.0, batch_first=True), ~CAUSAL), None),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_torch(name: str) -> None:
    build, recover = LAYERS[name]
    model = seeded(build)
    inputs = [(x, ~mask) for x, mask in samples("bool", count=32)]
    program = quantized_program(model, inputs, recover, strict=recover == "fast")
    check(program)
    assert [row.op for row in program.placement if row.where == "cpu"].count("aten.masked_fill.Scalar") <= 2
    assert signal_to_noise(program.run, model, inputs) >= 27


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("index", [0, 8, 13])
def test_in_the_documented_flow(index: int, strict: bool) -> None:
    spelling = SPELLINGS[index]
    model, inputs = spelling.model(), samples(spelling.kind)
    program = lower_documented(convert(model, inputs[0], strict=strict, calibration=inputs), inputs[0], strict=strict)
    assert program.delegates == 1
    assert signal_to_noise(program.run, model, inputs) >= 28


def test_a_bias_input_keeps_its_resolution() -> None:
    """A number that is added to scores without hiding one is not a mask, and does not widen the range of the scores."""
    model = seeded(lambda: Attention(lambda s, m: s + m))
    generator = torch.Generator().manual_seed(2)
    inputs = [
        (x, torch.randn(1, 1, LENGTH, LENGTH, generator=generator)) for x, _ in samples("bool")
    ]  # fmt: skip
    program = quantized_program(model, inputs)
    assert all(row.where == "npu" for row in program.placement)
    assert signal_to_noise(program.run, model, inputs) >= 28


def test_zeros_for_padding() -> None:
    model = Function(lambda layer, x, keep: layer(x).masked_fill(~keep[..., None], 0.0), nn.Linear(FEATURES, 4)).eval()
    inputs = samples("bool")
    program = quantized_program(model, inputs)
    check(program)
    out = torch.as_tensor(program.run(*inputs[0])).flatten(0, -2)
    assert not out[3:].any()
    assert signal_to_noise(program.run, model, inputs) >= 30


def test_a_fully_masked_query_returns_the_mean_of_all_values() -> None:
    """docs/options.md documents this for each kind of mask."""
    for index in (0, 13, 16, 18):
        spelling = SPELLINGS[index]
        program = quantized_program(spelling.model(), samples(spelling.kind))
        x, _ = samples(spelling.kind)[0]
        out = torch.as_tensor(program.run(x, mask_of(spelling.kind, 0))).flatten(0, -2)
        value = spelling.model().value
        assert isinstance(value, nn.Linear)
        assert torch.allclose(out, value(x).mean(1).expand_as(out), atol=0.05), spelling.label


def test_analyze_takes_infinite_masks() -> None:
    spelling = SPELLINGS[13]
    model, inputs = spelling.model(), samples(spelling.kind)
    quantized = quantize(model, inputs[0], inputs, recover=None, progress=False)
    found = analyze(model, quantized, inputs, samples=4)
    assert all(layer.sqnr_db > 20 for layer in found.layers)


@pytest.mark.parametrize("index", [0, 3, 6, 12])
def test_a_mask_while_training(index: int) -> None:
    """Hidden scores do not widen the range of the scores, although these are fake-quantized more than once."""
    spelling = SPELLINGS[index]
    model, inputs = spelling.model(), samples(spelling.kind)
    exported = torch.export.export(model.train(), inputs[0]).module()
    prepared = prepare_qat_pt2e(exported, NeutronQuantizer(is_qat=True))
    for sample in inputs * 2:
        prepared(*sample)
    assert signal_to_noise(convert_pt2e(prepared), model.eval(), inputs) >= 26


def test_infinite_values_that_are_not_a_mask() -> None:
    model = nn.Linear(FEATURES, 4).eval()
    inputs = [(torch.full((1, FEATURES), -math.inf),)]
    with pytest.raises(CalibrationError, match="infinite"):
        quantize(model, inputs[0], inputs, recover=None, progress=False)

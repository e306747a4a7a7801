"""Networks with attention: their operators, their accuracy, and hidden keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tests.attention_cases import BLIND
from tests.fidelity import signal_to_noise
from tests.flow_support import flat
from tests.oracle import Function, agreement, everything_on_the_npu, lowered, quantized, samples_like
from torch import nn

from openneutron import quantize
from openneutron.runtime import HostProgram

LENGTH, FEATURES = 9, 16


def causal(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    return layer(x, src_mask=mask, is_causal=True)  # type: ignore[no-any-return]


def encoder(norm_first: bool = False) -> nn.Module:
    return nn.TransformerEncoderLayer(FEATURES, 4, 32, dropout=0.0, batch_first=True, norm_first=norm_first)


def check(model: nn.Module, *shapes: tuple[int, ...], least: float = 25.0) -> None:
    """Checks for one delegate, at most 2 LSBs to the converted module, and at least `least` dB to the float model."""
    converted = quantized(model, shapes)
    program = lowered(converted)
    assert everything_on_the_npu(program), program.placement
    assert agreement(program, converted).worst <= 2
    host = HostProgram.from_bytes(program.buffer)
    assert signal_to_noise(host.run, model, samples_like(shapes, 4, 1, (0.0, 1.0))) >= least


def test_encoder_layers() -> None:
    torch.manual_seed(0)
    check(encoder(), (2, LENGTH, FEATURES))
    check(encoder(norm_first=True), (2, LENGTH, FEATURES))


def test_causal_encoder_layer() -> None:
    torch.manual_seed(0)
    check(Function(causal, encoder()), (2, LENGTH, FEATURES))


def test_decoder_layer() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(FEATURES, 4, 32, dropout=0.0, batch_first=True)
    check(layer, (2, LENGTH, FEATURES), (2, LENGTH + 3, FEATURES))


@torch.no_grad()
def test_embeddings_stay_on_the_cpu_beside_one_delegate() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, FEATURES), encoder(), nn.Flatten(), nn.Linear(LENGTH * FEATURES, 5)).eval()
    texts = [(torch.randint(0, 40, (2, LENGTH), generator=torch.Generator().manual_seed(seed)),) for seed in range(24)]
    program = lowered(quantize(model, texts[0], texts[:16]))
    assert [row.op for row in program.placement if row.where == "cpu"] == ["aten.embedding.default"]
    assert {row.partition for row in program.placement if row.where == "npu"} == {0}
    assert signal_to_noise(HostProgram.from_bytes(program.buffer).run, model, texts[16:]) >= 20


@torch.no_grad()
def test_masked_values_have_no_effect() -> None:
    """Keys that are hidden from all queries may have any value. A query whose keys are all hidden returns zeros."""
    seen = BLIND.clone()
    seen[:, 3] = False
    model = Function(lambda mask, q, k, v: F.scaled_dot_product_attention(q, k, v, mask), seen)
    shapes = ((1, 5, 4),) * 3
    host = HostProgram.from_bytes(lowered(quantized(model, shapes)).buffer)
    (inputs,) = samples_like(shapes, 1, 1, (0.0, 0.5))
    query, key, value = inputs
    other_key, other_value = key.clone(), value.clone()
    other_key[:, 3], other_value[:, 3] = 1.5, -1.5
    (got,), (same,) = flat(host.run(query, key, value)), flat(host.run(query, other_key, other_value))
    assert torch.equal(got, same)
    assert not got[:, BLIND.any(-1).logical_not()].any()
    assert got.any()

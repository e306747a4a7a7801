"""Quantization-aware training of operators that contain a dropout: attention and recurrent networks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.flow_support import flat, lower_documented, seeded, worst_lsb
from tests.models import Model
from tests.qat_support import BATCH, exported, operators, train
from torch import nn
from torch.fx import GraphModule
from torchao.quantization.pt2e import (
    disable_fake_quant,
    disable_observer,
    move_exported_model_to_eval,
    move_exported_model_to_train,
)
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

from openneutron import NeutronQuantizer, lower, prepare_training, quantize
from openneutron.training_flow import finish_training

STEPS, FEATURES = 6, 8
SHAPE = (STEPS, FEATURES)


class Attention(nn.Module):
    """`F.scaled_dot_product_attention` over two heads."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES)
        self.options = options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.linear(x).unflatten(-1, (2, -1)).transpose(1, 2)
        probability = 0.5 if self.training else 0.0
        found = F.scaled_dot_product_attention(heads, heads, heads, dropout_p=probability, **self.options)
        return found.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention`."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(FEATURES, 2, dropout=0.5, batch_first=True)
        self.options = options

    def forward(self, x: torch.Tensor) -> Any:
        result: tuple[torch.Tensor, torch.Tensor | None] = self.attention(x, x, x, **self.options)
        return result if self.options.get("need_weights", True) else result[0]


class Decoder(nn.Module):
    """`nn.TransformerDecoderLayer` with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(FEATURES, 2, 16, dropout=0.5, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(STEPS)
        result: torch.Tensor = self.layer(x, x, tgt_mask=mask, tgt_is_causal=True)
        return result


def recurrent(kind: Callable[..., nn.Module], **options: Any) -> nn.Module:
    def function(m: Any, x: torch.Tensor) -> Any:
        return m.net(x)[0] if m.net.batch_first else m.net(x.transpose(0, 1))[0].transpose(0, 1)

    return Model(function, net=kind(FEATURES, 4, **{"batch_first": True, **options}))


def state_of_the_batch(_: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x.mean((1, 2)).reshape(1, -1, 1).expand(1, -1, 4)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "attention": Attention,
    "causal attention": lambda: Attention(is_causal=True),
    "attention with a mask": lambda: Attention(attn_mask=torch.ones(STEPS, STEPS, dtype=torch.bool).tril()),
    "attention with a scale": lambda: Attention(scale=0.25),
    "self-attention": lambda: SelfAttention(need_weights=False),
    "self-attention with weights": SelfAttention,
    "encoder layer": lambda: nn.TransformerEncoderLayer(FEATURES, 2, 16, batch_first=True),
    "encoder layer, norm first": lambda: nn.TransformerEncoderLayer(FEATURES, 2, 16, batch_first=True, norm_first=True),
    "decoder layer": Decoder,
    "lstm": lambda: recurrent(nn.LSTM, num_layers=2, dropout=0.5),
    "lstm in both directions": lambda: recurrent(nn.LSTM, num_layers=2, dropout=0.5, bidirectional=True),
    "lstm, batch second": lambda: recurrent(nn.LSTM, num_layers=2, dropout=0.5, batch_first=False),
    "gru": lambda: recurrent(nn.GRU, num_layers=3, dropout=0.5),
    "elman": lambda: recurrent(nn.RNN, num_layers=2, dropout=0.5),
}


def prepared(model: nn.Module, **options: Any) -> GraphModule:
    """Prepares a model that was exported in train mode with a dynamic batch."""
    module: GraphModule = prepare_qat_pt2e(exported(model, SHAPE), NeutronQuantizer(is_qat=True, **options))
    return module


def example() -> torch.Tensor:
    return torch.randn(BATCH, *SHAPE, generator=torch.Generator().manual_seed(3))


def differs(module: GraphModule) -> bool:
    """Whether two runs of a module give different outputs."""
    first, second = (flat(module(example()))[0] for _ in range(2))
    return not torch.equal(first, second)


@pytest.mark.parametrize("name", MODELS)
def test_dropout_is_active_in_training_and_gone_at_conversion(name: str) -> None:
    module = train(prepared(seeded(MODELS[name])), SHAPE, steps=3)
    module.apply(disable_observer)
    assert differs(module)
    move_exported_model_to_eval(module)
    assert not differs(module)
    move_exported_model_to_train(module)
    assert differs(module)
    converted = convert_pt2e(module)
    assert not [op for op in operators(converted) if "dropout" in op or "lstm" in op or "attention" in op]
    lowered = lower_documented(converted, (example(),))
    assert (lowered.delegates, lowered.cpu) == (1, [])
    # the differences of the many operators of a decoder layer add up
    assert worst_lsb(converted, lowered.run, [(example(),)]) <= (4 if "decoder" in name else 2)


@pytest.mark.parametrize("name", ["attention", "encoder layer", "lstm"])
def test_dropout_has_its_probability(name: str) -> None:
    """A dropout of probability 0.5 zeroes half of the values, and doubles the others."""
    module = prepared(seeded(MODELS[name]))
    found = []
    for part in module.modules():
        if type(part).__name__ == "OnlyInTraining":
            part.register_forward_hook(lambda _, inputs, output: found.append((inputs[0], output)))
    module(example().repeat(20, 1, 1))
    before, after = found[0]
    dropped = float(((after == 0) & (before != 0)).float().mean())
    probability = 0.1 if name == "encoder layer" else 0.5
    assert abs(dropped - probability) < 0.03
    kept = after != 0
    torch.testing.assert_close(after[kept], before[kept] / (1 - probability))


@pytest.mark.parametrize("name", ["encoder layer", "lstm"])
def test_parts_that_stay_in_float(name: str) -> None:
    """Their dropout is removed, too."""
    model = nn.Sequential(seeded(MODELS[name]), nn.Linear(4 if name == "lstm" else FEATURES, 3))
    module = train(prepared(model, layers={"0": "float"}), SHAPE, steps=2)
    assert differs(module)
    converted = convert_pt2e(module)
    assert not [op for op in operators(converted) if "dropout" in op]
    lowered = lower_documented(converted, (example(),))
    assert worst_lsb(converted, lowered.run, [(example(),)]) <= 1


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_first_state_with_a_dynamic_batch(kind: Callable[..., nn.Module]) -> None:
    def function(m: Any, x: torch.Tensor) -> Any:
        first = state_of_the_batch(m, x)
        output, last = m.net(x, (first, first) if isinstance(m.net, nn.LSTM) else first)
        return output, last

    model = seeded(lambda: Model(function, net=kind(FEATURES, 4, batch_first=True)))
    converted = convert_pt2e(train(prepared(model), SHAPE, steps=3))
    lowered = lower_documented(converted, (example(),))
    assert lowered.delegates == 1
    assert worst_lsb(converted, lowered.run, [(example(),)]) <= 2


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_dynamic_batch_gives_the_outputs_of_a_fixed_one(kind: Callable[..., nn.Module]) -> None:
    model = seeded(lambda: recurrent(kind, num_layers=2)).train()
    fixed = prepare_qat_pt2e(
        torch.export.export(copy.deepcopy(model), (example(),)).module(), NeutronQuantizer(is_qat=True)
    )
    dynamic = prepared(model)
    for module in (fixed, dynamic):
        module.apply(disable_fake_quant)
    torch.testing.assert_close(fixed(example()), dynamic(example()), rtol=0, atol=1e-5)
    dynamic(example()[:3])


@pytest.mark.parametrize("name", ["attention", "encoder layer", "encoder layer, norm first", "lstm"])
def test_a_dynamic_batch_of_the_size_of_another_dimension(name: str) -> None:
    """The example inputs have as many samples as steps."""
    assert BATCH == STEPS
    module = prepared(seeded(MODELS[name]))
    for size in (BATCH, 2 * BATCH, 2):
        module(torch.ones(size, *SHAPE))


@pytest.mark.parametrize("name", ["encoder layer", "self-attention", "lstm"])
def test_the_short_flow_of_training(name: str) -> None:
    """It starts from a model in eval mode."""
    model, samples = seeded(MODELS[name]), [(example() + number,) for number in range(4)]
    trainable = prepare_training(quantize(model, samples[0], samples, recover=None, progress=False))
    optimizer = torch.optim.SGD(trainable.parameters(), lr=0.01)
    flat(trainable(*samples[0]))[0].square().mean().backward()
    optimizer.step()
    program = lower(finish_training(trainable))
    assert len({row.partition for row in program.placement}) == 1

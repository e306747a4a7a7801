"""`prepare_training` and `finish_training`: equal outputs before training, and after conversion and lowering."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tests.flow_support import seeded
from tests.state_models import RingBuffer
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from openneutron import NeutronQuantizer, finish_training, lower, prepare_training, quantize
from openneutron.accuracy.analyze import analyze
from openneutron.core.fx import is_dequantize, is_quantize
from openneutron.errors import InputError, ModelError, OptionError
from openneutron.quantizer.trained_modules import BatchNorm
from openneutron.training.fake_quantize import fake_quantize

# As a share of the largest output. Float rounding in products of another order seldom moves a value to the next code.
CLOSE = 0.03


class Reader(nn.Module):
    """Reads the first and the last step of a recurrent network [B, T, F]."""

    def __init__(self, network: nn.Module, width: int) -> None:
        super().__init__()
        self.network, self.head = network, nn.Linear(width, 3)

    def forward(self, steps: Tensor) -> Tensor:
        outputs = self.network(steps)[0]
        logits: Tensor = self.head(outputs[:, 0] + outputs[:, -1])  # both directions read several steps
        return logits


class OwnCell(nn.Module):
    """A minimal gated unit in a loop of Python."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.candidate, self.head = nn.Linear(10, 6), nn.Linear(10, 6), nn.Linear(6, 3)

    def forward(self, steps: Tensor) -> Tensor:
        state = torch.zeros(steps.shape[0], 6)
        for step in steps.unbind(1):
            gate = torch.sigmoid(self.gate(torch.cat([step, state], 1)))
            new = torch.tanh(self.candidate(torch.cat([step, gate * state], 1)))
            state = gate * state + (1 - gate) * new
        logits: Tensor = self.head(state)
        return logits


class Cells(nn.Module):
    """Two cells of torch in a loop of Python."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.LSTMCell(4, 6), nn.GRUCell(6, 6), nn.Linear(6, 3)

    def forward(self, steps: Tensor) -> Tensor:
        hidden, cell = torch.zeros(steps.shape[0], 6), torch.zeros(steps.shape[0], 6)
        state = torch.zeros(steps.shape[0], 6)
        for step in steps.unbind(1):
            hidden, cell = self.first(step, (hidden, cell))
            state = self.second(hidden, state)
        logits: Tensor = self.head(state)
        return logits


class Attention(nn.Module):
    """One layer of a transformer, and the mean over its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, steps: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(steps).mean(1))
        return logits


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU6(), nn.Dropout(), nn.Conv2d(4, 4, 3, groups=4),
        nn.Hardswish(), nn.Flatten(), nn.Linear(64, 3), nn.Softmax(1),
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    label: str
    build: Callable[[], nn.Module] = field(repr=False)
    shape: tuple[int, ...] = (5, 4)
    options: Mapping[str, Any] = field(default_factory=dict)


def lstm(**options: Any) -> nn.Module:
    return Reader(nn.LSTM(4, 6, batch_first=True, **options), 12 if options.get("bidirectional") else 6)


def gru() -> nn.Module:
    return Reader(nn.GRU(4, 6, batch_first=True), 6)


CASES = (
    Case("lstm", lstm),
    Case("lstm recovered", lstm, options={"recover": "auto"}),
    Case("lstm per channel", lstm, options={"weight_granularity": "per_channel"}),
    Case("wide lstm", lstm, options={"wide": [nn.LSTM]}),
    Case("bidirectional lstm", lambda: lstm(bidirectional=True)),
    Case("gru", gru),
    Case("own cell", OwnCell),
    Case("cells", Cells),
    Case("attention", Attention, options={"recover": "fast"}),
    Case("head in float", gru, options={"layers": {"head": "float"}}),
    Case("images", images, (2, 8, 8)),
    Case("images per channel", images, (2, 8, 8), {"weight_granularity": "per_channel", "recover": "fast"}),
)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.label.replace(" ", "_"))


def inputs(count: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def quantized_by(case: Case) -> tuple[nn.Module, Any]:
    model = seeded(case.build).eval()
    calibration = torch.split(inputs(8, case.shape), 1)
    options = {"recover": None, **case.options}
    return model, quantize(model, calibration[0], calibration, progress=False, **options)


def one_by_one(module: Any, values: Tensor) -> Tensor:
    return torch.cat([module(value) for value in torch.split(values, 1)])


def train(
    module: nn.Module, model: Callable[[Tensor], Tensor], values: Tensor, rate: float = 3e-3, steps: int = 3
) -> None:
    with torch.enable_grad():
        optimizer = torch.optim.Adam(module.parameters(), lr=rate)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (module(values) - model(values).detach()).square().sum()
            torch.autograd.backward(loss)
            optimizer.step()


def is_close(found: Tensor, wanted: Tensor) -> bool:
    return float((found - wanted).abs().max()) <= CLOSE * float(wanted.abs().max())


@every_case
def test_outputs_follow_the_quantized_model_before_and_after_training(case: Case) -> None:
    model, quantized = quantized_by(case)
    module, values = prepare_training(quantized), inputs(6, case.shape, seed=1)
    before = one_by_one(quantized, values)
    with torch.no_grad():
        several = module(values)
        assert is_close(several, before)
        torch.testing.assert_close(module(values[:, None])[:, 0], several)
        assert is_close(module(values[:1]), before[:1])
    parameters = {name: value.detach().clone() for name, value in module.named_parameters()}
    train(module, model, values)
    assert not [name for name, value in module.named_parameters() if torch.equal(value, parameters[name])]
    trained = finish_training(module)
    assert torch.equal(one_by_one(quantized, values), before)
    with torch.no_grad():
        assert is_close(one_by_one(trained, values), module(values))
    on_cpu = [row for row in lower(trained).placement if row.where != "npu"]
    assert bool(on_cpu) == ("layers" in case.options)


def test_steps_of_a_recurrent_network_share_weight_and_scales() -> None:
    _, quantized = quantized_by(CASES[0])
    module = prepare_training(quantized)
    sizes = [tuple(value.shape) for value in module.parameters()]
    # of the gates and of the candidate, for input and state; and of the head
    assert sorted(size for size in sizes if len(size) == 2) == [(3, 6), (6, 4), (6, 6), (18, 4), (18, 6)]
    train(module, lambda values: torch.zeros(len(values), 3), inputs(6, (5, 4)), rate=0.05)
    groups: dict[Any, set[Any]] = {}
    nodes = zip(quantized.module.graph.nodes, finish_training(module).module.graph.nodes, strict=True)
    moved = 0
    for old, new in nodes:
        if is_quantize(old) or is_dequantize(old):
            groups.setdefault(old.args[1:], set()).add(new.args[1:])
            moved += old.args[1:] != new.args[1:]
    assert moved
    trained = Counter(new.args[1:] for new in finish_training(module).module.graph.nodes if is_quantize(new))
    states = {qparams: count for qparams, count in trained.items() if qparams[0] not in (1 / 256, 1 / 128)}
    assert sorted(states.values())[-2:] >= [4, 4]  # the hidden states of 5 steps, and the cell states
    assert all(len(found) == 1 for found in groups.values())
    fixed = [new for old, new in groups.items() if old[0] in (1 / 256, 1 / 128)]
    assert fixed
    assert all(old in new for old, new in groups.items() if old[0] in (1 / 256, 1 / 128))


def test_calibrated_ranges_can_be_kept() -> None:
    model, quantized = quantized_by(CASES[0])
    module = prepare_training(quantized, learn_ranges=False)
    train(module, model, inputs(6, (5, 4)), rate=0.02)
    pairs = zip(quantized.module.graph.nodes, finish_training(module).module.graph.nodes, strict=True)
    activations = [(old, new) for old, new in pairs if is_quantize(old)]
    assert all(old.args[1:] == new.args[1:] for old, new in activations)


def test_training_widens_ranges_that_are_too_narrow() -> None:
    model = seeded(lstm).eval()
    values = inputs(32, (5, 4)) * 4
    module = prepare_training(model, values[:1], calibration=torch.split(values / 20, 1), recover=None)
    with torch.no_grad():
        before = (module(values) - model(values)).square().mean()
    train(module, model, values, rate=0.05, steps=40)
    trained = finish_training(module)
    with torch.no_grad():
        after = (one_by_one(trained, values) - model(values)).square().mean()
    assert after < before / 2
    assert analyze(None, trained, torch.split(values[:4], 1)).layers


def test_calls_need_not_be_batch_first() -> None:
    model = seeded(lambda: nn.GRU(4, 6)).eval()
    example = inputs(5, (1, 4))
    module = prepare_training(model, example, calibration=[example], recover=None)
    several = torch.stack([inputs(5, (1, 4), seed=seed) for seed in range(3)])
    with torch.no_grad():
        outputs, state = module(several)
        assert outputs.shape == (3, 5, 1, 6)
        assert state.shape == (3, 1, 1, 6)
        alone = [module(one)[0] for one in several]
    assert is_close(outputs, torch.stack(alone))


class OtherOutputs(nn.Module):
    """Returns tensors, None and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, values: Tensor) -> dict[str, Any]:
        return {"logits": self.head(values), "attention": None, "rest": (2, values.sum(1, keepdim=True))}


@pytest.mark.parametrize("several", [inputs(6, (4,)), inputs(3, (2, 4))], ids=["batch", "stack"])
def test_outputs_that_are_not_tensors(several: Tensor) -> None:
    example = inputs(2, (4,))
    module = prepare_training(seeded(OtherOutputs).eval(), example, calibration=[example], recover=None)
    alone = module(several[0] if several.dim() == 3 else several[:2])
    outputs = module(several)
    assert outputs["attention"] is None
    assert outputs["rest"][0] == 2
    assert is_close(outputs["logits"][:1].reshape(-1)[:3], alone["logits"].reshape(-1)[:3])
    assert outputs["rest"][1].shape == (*several.shape[:-1], 1)


def test_documented_flow() -> None:
    model = seeded(gru).eval()
    example = (inputs(1, (5, 4)),)
    prepared = prepare_pt2e(torch.export.export(model, example).module(), NeutronQuantizer())
    prepared(*example)
    converted = convert_pt2e(prepared)
    module = prepare_training(converted, example)
    train(module, model, inputs(4, (5, 4)))
    trained = finish_training(module)
    assert trained.reference is None
    assert {row.where for row in lower(trained).placement} == {"npu"}


def test_state() -> None:
    model = RingBuffer().eval()
    frames = inputs(6, RingBuffer.frame)
    quantized = quantize(model, frames[0], list(frames), recover=None, progress=False)
    module = prepare_training(quantized)
    quantized.reset()
    with torch.no_grad():
        for frame in frames:
            assert is_close(module(frame), quantized(frame))
    with torch.enable_grad():
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
        for frame in frames:
            torch.autograd.backward(module(frame).square().sum())
        optimizer.step()
    module.reset()
    with torch.no_grad():
        begun = [module(frame) for frame in frames]
        module.reset()
        assert all(torch.equal(module(frame), before) for frame, before in zip(frames, begun, strict=True))
    trained = finish_training(module)
    first = trained(frames[0])
    trained.reset()
    assert torch.equal(trained(frames[0]), first)
    with pytest.raises(InputError, match="one sample at a time"):
        module(frames)


def test_gradients() -> None:
    values = torch.tensor([-9.0, -0.26, 0.0, 0.24, 9.0], requires_grad=True)
    scale = torch.tensor([0.5], requires_grad=True)
    with torch.enable_grad():
        rounded = fake_quantize(values, scale, 1, -4, 3)
        torch.autograd.backward(rounded.sum())
    assert rounded.tolist() == [-2.5, -0.5, 0.0, 0.0, 1.0]
    assert values.grad is not None
    assert values.grad.tolist() == [0, 1, 1, 1, 0]
    # Clipped values give the limit's code (-4 - 1, 3 - 1); others the rounding error in steps.
    assert scale.grad is not None
    expected = (-5 + (-1 + 0.52) + 0 + (0 - 0.48) + 2) / (5 * 3) ** 0.5
    assert float(scale.grad) == pytest.approx(expected, abs=1e-5)


def test_gradients_of_scales_do_not_depend_on_the_number_of_samples() -> None:
    samples = inputs(6, (5,))
    scale = torch.tensor([0.25], requires_grad=True)

    def gradient(loss: Tensor) -> float:
        (found,) = torch.autograd.grad(loss, scale)
        return float(found)

    def one(values: Tensor) -> Tensor:
        return fake_quantize(values, scale, 1, -4, 3).square().sum()

    with torch.enable_grad():
        together = gradient(torch.func.vmap(one)(samples).mean())
        alone = [gradient(one(values)) for values in samples]
    assert together == pytest.approx(sum(alone) / len(alone), rel=1e-4)
    assert together != 0


def test_wrong_use() -> None:
    model, quantized = quantized_by(CASES[-2])
    module = prepare_training(quantized)
    with pytest.raises(OptionError, match="needs calibration data"):
        prepare_training(model, inputs(1, (2, 8, 8)))
    with pytest.raises(OptionError, match="does not take calibration, recover"):
        prepare_training(quantized, calibration=[], recover=None)
    with pytest.raises(OptionError, match="no option 'recovers'"):
        prepare_training(model, inputs(1, (2, 8, 8)), [inputs(1, (2, 8, 8))], recovers=None)
    with pytest.raises(OptionError, match="needs example_inputs"):
        prepare_training(quantized.module)
    with pytest.raises(OptionError, match="learn_ranges"):
        prepare_training(quantized, learn_ranges=1)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="prepared for training already"):
        prepare_training(module)
    with pytest.raises(ModelError, match="Call finish_training"):
        quantize(module, inputs(1, (2, 8, 8)), [])
    with pytest.raises(ModelError, match="result of finish_training"):
        lower(module)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"takes a module from prepare_training\(\), not Sequential"):
        finish_training(model)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"A sample is torch.float32 \[1, 2, 8, 8\]"):
        module(inputs(3, (2, 8, 9)))
    with pytest.raises(InputError, match="structure"):
        module()
    without = quantize(nn.Sequential(nn.ReLU(), nn.Sigmoid()).eval(), inputs(1, (3,)), [inputs(1, (3,))], recover=None)
    with pytest.raises(ModelError, match="nothing to train"):
        prepare_training(without)
    assert not any(isinstance(part, BatchNorm) for part in module.modules())

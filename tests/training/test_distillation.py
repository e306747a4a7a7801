"""`distill`: training towards the float model, which does not end with a larger error than it began with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from tests.flow_support import convert, seeded
from tests.state_models import RingBuffer
from torch import Tensor, nn

from openneutron import distill, finish_training, lower, prepare_training, quantize
from openneutron.errors import InputError, ModelError, OptionError
from openneutron.training import distillation
from openneutron.training.distillation import ComparedValues, KeptValues, parameter_groups
from openneutron.training.trainable import TrainableModel


class Reader(nn.Module):
    """An LSTM over steps [B, 6, 3] and a head; also returns None."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, steps: Tensor) -> tuple[Tensor, None]:
        return self.head(self.lstm(steps)[0][:, -1]), None


def inputs(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 6, 3, generator=torch.Generator().manual_seed(seed))


def prepared(**options: Any) -> tuple[nn.Module, TrainableModel]:
    model, data = seeded(Reader).eval(), inputs(16)
    return model, prepare_training(model, data[:1], data, recover=None, progress=False, **options)


@pytest.fixture(scope="module")
def module() -> TrainableModel:
    return prepared()[1]


def error(model: nn.Module, module: Any, values: Tensor) -> float:
    with torch.no_grad():
        found = torch.cat([module(value)[0] for value in torch.split(values, 1)])
        return float((found - model(values)[0]).square().sum())


@pytest.mark.parametrize("caller", [torch.enable_grad, torch.no_grad])
def test_training_reduces_the_error(caller: Callable[[], AbstractContextManager[None]]) -> None:
    model, module = prepared(weight_bits=4)
    tests = inputs(64, seed=2)
    before = error(model, module, tests)
    with caller():
        found = distill(module, inputs(256, seed=1), steps=60, rate=0.05)
    assert found.steps == 60
    assert found.sqnr_after_db > found.sqnr_before_db + 0.4
    assert error(model, finish_training(module), tests) < before


@pytest.mark.parametrize("rate", [3.0, 1000.0])
def test_a_rate_that_is_too_high_does_not_end_below_the_start(rate: float) -> None:
    model, module = prepared()
    held_out = inputs(64, seed=1)[::8]
    before = error(model, module, held_out)
    found = distill(module, inputs(64, seed=1), steps=20, rate=rate, batch=8)
    assert found.sqnr_after_db >= found.sqnr_before_db
    assert error(model, module, held_out) <= before * 1.01


def test_parameters_of_operators_in_float_are_trained_and_kept() -> None:
    model, module = prepared(layers={"head": "float"})
    distill(module, inputs(64, seed=1), steps=40, rate=0.05)
    trained = finish_training(module)
    tests = inputs(16, seed=2)
    assert error(model, trained, tests) == pytest.approx(error(model, module, tests), rel=1e-2)
    names = [name for name, _ in trained.module.named_parameters()]
    assert names
    assert trained.reference is not None
    for name in names:
        parameter = module.graph_module.get_parameter(name)
        assert torch.equal(trained.module.get_parameter(name), parameter)
        assert not torch.equal(module.quantized.module.get_parameter(name), parameter)
        assert torch.equal(trained.reference.get_parameter(name), parameter)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_rates_are_in_steps_of_the_largest_weight(granularity: str) -> None:
    _, module = prepared(weight_granularity=granularity)
    groups = parameter_groups(module, 0.5)
    parameters = [id(parameter) for group in groups for parameter in group["params"]]  # type: ignore[attr-defined]
    assert sorted(parameters) == sorted(map(id, module.parameters()))
    for group in groups[:2]:
        (weight,) = group["params"]  # type: ignore[misc]
        assert group["lr"] == pytest.approx(0.5 * float(weight.detach().abs().max()) / 127, rel=0.1)  # type: ignore[has-type]


@pytest.mark.parametrize(("kept", "computed"), [(4, [[2, 0], [1]]), (1, [[2, 0], [0, 1]]), (0, [[2, 0], [2, 0, 1]])])
def test_values_of_the_float_model_are_computed_once_per_sample_within_the_limit(
    kept: int, computed: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "MOST_KEPT", kept * 3 * 4)
    data, calls = inputs(3)[:, 0], []

    def compute(chosen: Sequence[int]) -> list[Tensor]:
        calls.append(list(chosen))
        return [data[list(chosen)]]

    values = KeptValues(compute)
    for chosen in ([2, 0, 2], [2, 0, 1]):
        (found,) = values(chosen)
        assert torch.equal(found, data[chosen])
    assert calls == computed


def test_documented_flow_takes_the_float_model() -> None:
    model, data = seeded(Reader).eval(), inputs(16)
    module = prepare_training(
        convert(model, (data[:1],), calibration=[(one,) for one in torch.split(data, 1)]), data[:1]
    )
    with pytest.raises(ModelError, match="Give the float model"):
        distill(module, data, steps=2)
    assert distill(module, data, model=model, steps=2).steps == 2


class Wrapped(nn.Module):
    """Returns the scores after `change`."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.reader, self.change = Reader(), change

    def forward(self, steps: Tensor) -> Any:
        return self.change(self.reader(steps)[0])


WRONG_TEACHERS: dict[str, tuple[Any, str]] = {
    "train mode": (lambda: Reader().train(), "Call model.eval"),
    "a part in train mode": (lambda: nn.Sequential(Reader().train()).eval().append(nn.Dropout()), "is in train mode"),
    "no function": (lambda: "reader.pt", "must be the float model, not str"),
    "more outputs": (lambda: Wrapped(lambda y: (y, y)).eval(), "have the shapes"),
    "no outputs": (lambda: Wrapped(lambda y: y.argmax(1)).eval(), "have the shapes"),
    "other shape": (lambda: Wrapped(lambda y: y[:, 1:]).eval(), "have the shapes"),
}


@pytest.mark.parametrize("name", WRONG_TEACHERS)
def test_another_model_than_the_float_model_is_refused(name: str) -> None:
    build, message = WRONG_TEACHERS[name]
    with pytest.raises(ModelError, match=message):
        distill(prepared()[1], inputs(8), model=build(), steps=1)


@pytest.mark.parametrize("change", [lambda y: y.argmax(1), lambda y: y.argmax(1).float()], ids=["int", "float"])
def test_a_model_without_scores_is_refused(change: Callable[[Tensor], Any]) -> None:
    model, data = seeded(lambda: Wrapped(change)).eval(), inputs(8)
    module = prepare_training(model, data[:1], data, recover=None, progress=False)
    with pytest.raises(ModelError, match="No output of floating point depends on trained weights"):
        distill(module, data, steps=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seconds", "600"), ("seconds", None), ("seconds", True), ("seconds", 0), ("seconds", math.nan),
        ("seconds", math.inf), ("seconds", 10**400), ("rate", 0), ("rate", math.inf), ("rate", math.nan),
        ("rate", 1e300), ("rate", 10**400), ("rate", 1001), ("rate", [1]), ("batch", 1.5), ("batch", math.inf),
        ("batch", True), ("batch", 0), ("steps", 1.5), ("steps", 0), ("steps", -1), ("steps", torch.tensor(2)),
    ],
)  # fmt: skip
def test_invalid_numbers_are_refused(name: str, value: Any, module: TrainableModel) -> None:
    options = {name: value}
    with pytest.raises(OptionError, match=rf"({name}|Training without a limit of seconds).*\. Give "):
        distill(module, inputs(8), **options)


@pytest.mark.parametrize("seconds", [math.inf, 10**400])
def test_numbers_of_numpy_and_no_limit_of_seconds_are_valid(seconds: float, module: TrainableModel) -> None:
    found = distill(module, inputs(8), seconds, steps=np.int64(2), rate=np.float32(0.02), batch=np.int32(3))  # type: ignore[arg-type]
    assert found.steps == 2


def test_functions_that_need_gradients_refuse_inference_mode(module: TrainableModel) -> None:
    """`lower` needs no gradients."""
    model, data = seeded(Reader).eval(), inputs(8)
    calls: dict[str, Callable[[], Any]] = {
        "quantize": lambda: quantize(model, data[:1], data),
        "prepare_training": lambda: prepare_training(model, data[:1], data),
        "distill": lambda: distill(module, data),
    }
    with torch.inference_mode():
        for name, call in calls.items():
            with pytest.raises(ModelError, match=rf"^{name}\(\) needs gradients.*\. Call {name}\(\) outside of it"):
                call()
        assert lower(module.quantized).buffer


class Scaled(Reader):
    """Takes a scale of no dimensions."""

    def forward(self, steps: Tensor, scale: Tensor) -> Any:  # type: ignore[override]
        return super().forward(steps)[0] * scale


def test_a_scalar_is_stacked_with_the_samples_or_refused() -> None:
    data, scale = inputs(4), torch.tensor(2.0)
    samples = [(one, scale) for one in torch.split(data, 1)]
    module = prepare_training(seeded(Scaled).eval(), samples[0], samples, recover=None, progress=False)
    assert module(data[:, None], torch.full((4,), 2.0)).shape == (4, 1, 4)
    for wrong in ((data, scale), (data[:, None], scale), (data[:0, None], torch.zeros(0))):
        with pytest.raises(InputError, match="A sample is"):
            module(*wrong)


def test_wrong_use() -> None:
    model, module = prepared()
    with pytest.raises(ModelError, match=r"from prepare_training.*Call prepare_training\(\) first"):
        distill(model, inputs(8))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="rate must be"):
        distill(module, inputs(8), rate=0)
    with pytest.raises(ModelError, match=r"not str\. Give the module or function"):
        distill(module, inputs(8), model="x")
    with pytest.raises(InputError, match="two samples"):
        distill(module, inputs(1))
    with pytest.raises(InputError):
        distill(module, torch.zeros(8, 5, 5))
    frames = torch.randn(4, *RingBuffer.frame)
    with pytest.raises(ModelError, match="has state"):
        distill(prepare_training(quantize(RingBuffer().eval(), frames[0], list(frames), recover=None)), frames)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([0.0, 0.9], 20.0),  # a sample without signal has no weight
        ([5.0, 0.9], 20.0),
        ([0.0, 1.0], 60.0),  # limits
        ([0.0, 1e9], -20.0),
        ([0.0, math.nan], math.nan),
    ],
)
def test_mean_sqnr_of_a_sample_without_signal_and_another_one(found: list[float], expected: float) -> None:
    values, wanted = torch.tensor(found), torch.tensor([0.0, 1.0])
    comparison = ComparedValues(
        wanted=lambda chosen: [wanted[list(chosen)]],
        found=lambda leaves: [values[leaves[0]]],
        outputs=1,
        samples=[(torch.tensor(0),), (torch.tensor(1),)],
    )
    for batch in (1, 2):
        assert comparison.mean_sqnr([0, 1], batch) == pytest.approx(expected, abs=1e-3, nan_ok=True)

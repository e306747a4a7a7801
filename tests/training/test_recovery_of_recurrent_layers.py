"""The training of recurrent layers on calibration inputs, as a part of recovery."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.flow_support import seeded
from tests.recovery.test_cell_scales import sqnr
from tests.test_documented_flow import RECURRENT, joined, samples_of
from tests.training.test_layer_states import NETWORKS, quantized, sequences
from torch import nn
from torch.utils._pytree import tree_map

from openneutron import QuantizedModel, flow, lower, quantize
from openneutron.recovery.recipes import RECIPES, Recipe
from openneutron.training import recurrent_layers
from openneutron.training.recurrent_layers import FEWEST_SAMPLES, train_recurrent_layers
from openneutron.training.trainable import TrainableModel

ALONE = Recipe(range_by="mse", trains_recurrent_layers=False)


def error(model: QuantizedModel) -> float:
    tests, float_model = sequences(64, seed=2), seeded(NETWORKS["two layers"][0]).eval()
    with torch.no_grad():
        found = torch.cat([model(one)[0] for one in torch.split(tests, 1)])
        return float((found - float_model(tests)[0]).square().sum())


def codes(model: QuantizedModel) -> list[torch.Tensor]:
    return [value for value in model.module.state_dict().values() if value.dtype == torch.int8]


@pytest.fixture(scope="module")
def recovered() -> QuantizedModel:
    return quantized(NETWORKS["two layers"][0], recover=ALONE, weight_bits=4)


def samples(count: int = FEWEST_SAMPLES) -> list[tuple[torch.Tensor, ...]]:
    return [(value[None],) for value in sequences(count)]


@pytest.fixture
def train_accurate_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains small models, too, although they are accurate, and uses any result. Makes fewer updates, to save time."""
    monkeypatch.setattr(recurrent_layers, "STEPS", 120)
    monkeypatch.setattr(recurrent_layers, "ENOUGH_DB", 60.0)
    monkeypatch.setattr(recurrent_layers, "LEAST_GAIN_DB", -math.inf)


@pytest.mark.usefixtures("train_accurate_models")
def test_training_reduces_the_error_on_other_inputs(recovered: QuantizedModel) -> None:
    trained = train_recurrent_layers(recovered, samples(64))
    assert error(trained) < 0.9 * error(recovered)
    assert trained.reference is recovered.reference  # analyze compares with the float model
    (sample,) = samples(1)
    found = lower(trained, payload="portable").run(*sample)
    assert torch.allclose(found[0] if isinstance(found, tuple) else found, trained(*sample)[0], atol=0.05)


@pytest.mark.usefixtures("train_accurate_models")
def test_auto_trains_recurrent_layers() -> None:
    trained, other = (
        quantized(NETWORKS["two layers"][0], 64, recover=recover, weight_bits=3) for recover in ("auto", ALONE)
    )
    assert error(trained) < 0.95 * error(other)


@pytest.mark.parametrize("seed", [0, 5])
def test_auto_loses_no_accuracy_on_other_inputs(seed: int) -> None:
    """Inputs of which a few values are large: training alone would reduce the SQNR by 1 dB or more."""
    auto, data, others = RECIPES["auto"], samples_of(32, seed), samples_of(64, seed + 1)
    assert auto is not None
    model = seeded(RECURRENT["loop of LSTM cells"]).eval()
    trained, other = (
        quantize(model, data[0], data, recover=recover, weight_bits=4, progress=False)
        for recover in ("auto", replace(auto, trains_recurrent_layers=False))
    )
    ratios = [sqnr(joined(model, others), joined(found.module, others)) for found in (trained, other)]
    assert ratios[0] > ratios[1] - 0.3


@pytest.mark.usefixtures("train_accurate_models")
def test_training_is_deterministic(recovered: QuantizedModel) -> None:
    first, second = (train_recurrent_layers(recovered, samples(64)) for _ in range(2))
    assert all(map(torch.equal, codes(first), codes(second)))
    assert not all(map(torch.equal, codes(first), codes(recovered)))


@pytest.mark.usefixtures("train_accurate_models")
def test_a_loss_on_held_out_samples_is_not_used_because_of_an_exact_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The outputs of a GRU without biases are zeros for an input of zeros, in float and in int8."""
    monkeypatch.setattr(recurrent_layers, "LEAST_GAIN_DB", 0.2)
    monkeypatch.setattr(recurrent_layers, "RATE", 20.0)
    data = [(torch.zeros(1, 6, 3),), *samples(23)]
    model = seeded(lambda: nn.GRU(3, 8, bias=False, batch_first=True)).eval()
    recovered = quantize(model, data[0], data, recover=ALONE, progress=False)
    with caplog.at_level(logging.INFO, "openneutron"):
        assert train_recurrent_layers(recovered, data) is recovered
    assert "inf dB" not in caplog.text
    assert "Training of recurrent layers" in caplog.text


def test_an_accurate_model_is_not_trained(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def backward(*_: Any) -> None:
        raise AssertionError("computes gradients")

    monkeypatch.setattr(torch.autograd, "backward", backward)
    model = quantized(NETWORKS["two layers"][0], recover=ALONE)
    with caplog.at_level(logging.INFO, "openneutron"):
        assert train_recurrent_layers(model, samples(64)) is model
    assert "Training of recurrent layers" not in caplog.text


@pytest.mark.parametrize(
    ("recover", "limit"), [("auto", math.inf), ("best", 1000.0), ("fast", None), (ALONE, None), (None, None)]
)
def test_recipes_train_recurrent_layers_within_the_time_limit_of_best(
    recover: Any, limit: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []

    def train(model: QuantizedModel, _: Any, *, seconds: float, **__: Any) -> QuantizedModel:
        given.append(seconds)
        return model

    def choose_at_once(*_: Any, seconds: float, **__: Any) -> tuple[Recipe, list[Any]]:
        assert seconds == limit
        time.sleep(0.1)
        return Recipe(), []

    monkeypatch.setattr(flow, "train_recurrent_layers", train)
    monkeypatch.setattr(flow, "try_recipes", choose_at_once)
    quantized(NETWORKS["LSTM"][0], recover=recover, recovery_seconds=1000.0)
    assert len(given) == (limit is not None)
    assert all(seconds <= limit - 0.1 for seconds in given if limit is not None)


@pytest.mark.usefixtures("train_accurate_models")
def test_a_small_gain_is_not_used(recovered: QuantizedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrent_layers, "LEAST_GAIN_DB", 40.0)
    assert train_recurrent_layers(recovered, samples(64)) is recovered


REFUSALS: dict[str, dict[str, Any]] = {
    "few samples": {"count": FEWEST_SAMPLES - 1},
    "many products": {"MOST_PRODUCTS": 1.0},
    "many operators": {"MOST_OPERATORS": 1.0},
    "no time": {"seconds": 0.0},
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_model_beyond_a_limit_is_not_trained(
    name: str, recovered: QuantizedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limits = dict(REFUSALS[name])
    count, seconds = limits.pop("count", FEWEST_SAMPLES), limits.pop("seconds", math.inf)
    for limit, value in limits.items():
        monkeypatch.setattr(recurrent_layers, limit, value)
    with caplog.at_level(logging.INFO, "openneutron"):
        assert train_recurrent_layers(recovered, samples(count), seconds=seconds) is recovered
    assert ("does not train the recurrent layers" in caplog.text) == (count == FEWEST_SAMPLES)


def test_a_model_without_recurrent_layers_is_not_trained() -> None:
    model = quantized(NETWORKS["no layer is recurrent"][0])
    assert train_recurrent_layers(model, samples()) is model


def test_values_that_depend_on_no_parameter_are_not_trained(
    recovered: QuantizedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compute = TrainableModel.of_samples

    def of_samples(*args: Any) -> Any:
        return tree_map(lambda value: value if value is None else value.detach(), compute(*args))

    monkeypatch.setattr(TrainableModel, "of_samples", of_samples)
    with caplog.at_level(logging.INFO, "openneutron"):
        assert train_recurrent_layers(recovered, samples()) is recovered
    assert "have no gradient" in caplog.text


def test_other_errors_of_torch_are_raised(recovered: QuantizedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_samples(*_: Any) -> Any:
        raise RuntimeError("element 0 of tensors does not require grad and does not have a grad_fn")

    monkeypatch.setattr(TrainableModel, "of_samples", of_samples)
    with pytest.raises(RuntimeError, match="does not require grad"):
        train_recurrent_layers(recovered, samples())


def test_a_model_without_gradients_is_not_trained(
    recovered: QuantizedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def of_samples(*_: Any) -> Any:
        raise RuntimeError("Batching rule not implemented for aten::some_operator")

    monkeypatch.setattr(TrainableModel, "of_samples", of_samples)
    with caplog.at_level(logging.INFO, "openneutron"):
        assert train_recurrent_layers(recovered, samples()) is recovered
    assert "some_operator" in caplog.text

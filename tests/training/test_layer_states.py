"""The states of recurrent layers, which training compares with those of the float graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tests.flow_support import seeded
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from openneutron import QuantizedModel, distill, prepare_training, quantize
from openneutron.model.data import forms_of, inputs_in
from openneutron.training.distillation import Distillation
from openneutron.training.layer_states import compare_states, reading_states, recurrent_states
from openneutron.training.trainable import TrainableModel

STEPS = 6


class Last(nn.Module):
    """Returns the last output of a recurrent network [B, 6, 3], and None."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, steps: Tensor) -> tuple[Tensor, None]:
        return self.network(steps)[0][:, -1], None


class Loop(nn.Module):
    """Calls one linear three times, each time on its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(3, 3)

    def forward(self, value: Tensor) -> Tensor:
        for _ in range(3):
            value = torch.tanh(self.step(value))
        return value


class Twice(nn.Module):
    """Calls one linear on two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(3, 4)

    def forward(self, value: Tensor) -> Tensor:
        return torch.relu(self.branch(value)) + torch.relu(self.branch(-value))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[int]]] = {
    "LSTM": (lambda: Last(nn.LSTM(3, 8, batch_first=True)), [STEPS - 1]),
    "two layers": (lambda: Last(nn.LSTM(3, 8, 2, batch_first=True)), [STEPS - 1] * 2),
    "two directions": (lambda: Last(nn.GRU(3, 8, batch_first=True, bidirectional=True)), [STEPS - 1] * 2),
    "loop": (Loop, [2]),
    "no layer is recurrent": (Twice, []),
    "no weight is shared": (lambda: nn.Linear(3, 4), []),
}
"""Networks, and the number of states of each of their recurrent layers."""


def sequences(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, STEPS, 3, generator=torch.Generator().manual_seed(seed))


def quantized(build: Callable[[], nn.Module], count: int = 16, **options: Any) -> QuantizedModel:
    data = sequences(count)
    return quantize(seeded(build).eval(), data[:1], data, progress=False, **{"recover": None, **options})


@pytest.mark.parametrize("name", NETWORKS)
def test_each_recurrent_layer_has_its_states(name: str) -> None:
    build, counts = NETWORKS[name]
    assert [len(states) for states in recurrent_states(quantized(build).module)] == counts


@pytest.mark.parametrize("name", ["LSTM", "two directions", "loop"])
def test_float_and_trained_graph_compute_states_under_the_same_names(name: str) -> None:
    model = quantized(NETWORKS[name][0])
    assert model.reference is not None
    states = recurrent_states(model.module)
    sample = sequences(1, seed=1)
    (found, of_layers), (wanted, of_float) = (
        reading_states(module, states)(sample) for module in (TrainableModel(model).graph_module, model.reference)
    )
    pairs = list(zip(tree_leaves((found, of_layers)), tree_leaves((wanted, of_float)), strict=True))
    tensors = [pair for pair in pairs if isinstance(pair[0], Tensor)]
    assert len(tensors) == 1 + sum(map(len, states))
    for value, real in tensors:
        assert (value - real).square().sum() < 0.01 * real.square().sum()


def test_comparison_has_one_value_per_output_and_layer() -> None:
    model, data = quantized(NETWORKS["two layers"][0]), [(value[None],) for value in sequences(4)]
    assert model.reference is not None
    comparison = compare_states(TrainableModel(model), model.reference, recurrent_states(model.module), data)
    shapes = [list(value.shape) for value in comparison.wanted([0, 2])]
    assert comparison.outputs == 1
    assert shapes == [list(value.shape) for value in comparison.found((torch.stack([data[0][0], data[2][0]]),))]
    assert shapes == [[2, 1, 8], [2, 8 * (STEPS - 1)], [2, 8 * (STEPS - 1)]]
    assert float(comparison.loss([0, 1])) > 0


def test_training_with_states_reduces_the_errors_of_states_on_other_inputs() -> None:
    """Other seeds of the samples change the ratio of the errors little: it is 0.37 for seed 1 and 0.36 for seed 3."""
    build = NETWORKS["two layers"][0]
    data, others = sequences(256, seed=1), [(value[None],) for value in sequences(128, seed=2)]

    def error_of_states(float_model: nn.Module | None) -> float:
        module = prepare_training(quantized(build, weight_bits=4))
        assert module.quantized.reference is not None
        distill(module, data, steps=120, rate=0.1, model=float_model)
        states = recurrent_states(module.quantized.module)
        comparison = compare_states(module, module.quantized.reference, states, others)
        return float(comparison.loss(range(len(others))).detach())

    assert error_of_states(None) < 0.7 * error_of_states(seeded(build).eval())


@pytest.mark.parametrize(
    ("has_states", "options", "expected"),
    [(True, {}, (0.04, 16)), (False, {}, (0.02, 32)), (True, {"rate": 0.01, "batch": 2}, (0.01, 2))],
)
def test_training_with_states_has_other_defaults(
    has_states: bool, options: dict[str, Any], expected: tuple[float, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def record(*_: object, rate: float, batch: int, **__: object) -> Distillation:
        found.append((rate, batch))
        return Distillation(0, 0.0, 0.0)

    monkeypatch.setattr("openneutron.training_flow.train_towards", record)
    build = NETWORKS["two layers"][0]
    float_model = None if has_states else seeded(build).eval()
    distill(prepare_training(quantized(build)), sequences(4), steps=1, model=float_model, **options)
    assert found == [expected]


class Named(nn.Module):
    """Takes keyword arguments that are not in alphabetical order."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 8, batch_first=True)

    def forward(self, steps: Tensor, *, offset: Tensor, factor: Tensor) -> Tensor:
        scaled: Tensor = self.lstm(steps + offset)[0][:, -1] * factor[:, 0, :1]
        return scaled


def test_samples_keep_the_order_of_keyword_arguments() -> None:
    def arguments(seed: int) -> dict[str, Tensor]:
        return {"steps": sequences(1, seed), "offset": sequences(1, seed + 100), "factor": 4 + sequences(1, seed + 200)}

    data = [arguments(seed) for seed in range(16)]
    model = quantize(seeded(Named).eval(), data[0], data, recover=None, progress=False)
    module = TrainableModel(model)
    leaves = [tuple(inputs_of(module, one)) for one in data[:3]]
    found = module.of_samples([torch.stack(each) for each in zip(*leaves, strict=True)])
    for value, one in zip(found, data[:3], strict=True):
        assert torch.allclose(value, model(**one), atol=1e-5)


def inputs_of(module: TrainableModel, sample: dict[str, Tensor]) -> Sequence[Any]:
    (leaves,) = inputs_in([sample], forms_of(module.graph_module))
    return leaves

"""Recurrent layers in an analysis: their steps form one layer, with shares, gains and advice."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.flow_support import seeded
from tests.training.test_training import Attention, Cells, OwnCell, gru, inputs, lstm
from torch import Tensor, nn

from openneutron import QuantizedModel, quantize
from openneutron.accuracy import advice
from openneutron.accuracy.analyze import Analysis, analyze
from openneutron.accuracy.quantized_layers import find_layers
from openneutron.accuracy.recurrent_layers import recurrent_layers
from openneutron.results.layerwise_accuracy import Gain, RecurrentAccuracy

STEPS = 5


class Deep(nn.Module):
    """Two recurrent layers in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.head = nn.LSTM(4, 6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, steps: Tensor) -> Tensor:
        logits: Tensor = self.head(self.network(steps)[0][:, -1])
        return logits


class Siamese(nn.Module):
    """Reads two inputs by one convolution, whose uses do not depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.head = nn.Conv1d(5, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        both = self.convolution(x) + torch.relu(self.convolution(x.flip(2)))
        logits: Tensor = self.head(both.mean(2))
        return logits


@cache
def quantized(build: Callable[[], nn.Module]) -> QuantizedModel:
    calibration = torch.split(inputs(4, (STEPS, 4)), 1)
    return quantize(seeded(build).eval(), calibration[0], calibration, recover=None, progress=False)


@cache
def analyzed(build: Callable[[], nn.Module]) -> Analysis:
    return analyze(None, quantized(build), torch.split(inputs(4, (STEPS, 4)), 1), candidates=2, share_samples=2)


def bidirectional() -> nn.Module:
    return lstm(bidirectional=True)


@pytest.mark.parametrize(
    ("build", "modules", "layers_of_a_step"),
    [
        (lstm, [("network",)], 11),
        (Deep, [("network",)] * 2, 11),
        (bidirectional, [("network",)] * 2, 11),
        (gru, [("network",)], 10),
        (OwnCell, [("gate", "candidate")], 10),
        (Cells, [("first",), ("second",)], None),
        (Attention, [], None),
        (Siamese, [], None),
    ],
)
def test_steps_form_one_layer(build: Any, modules: list[tuple[str, ...]], layers_of_a_step: int | None) -> None:
    model = quantized(build)
    assert model.reference is not None
    found = find_layers(model.module, model.reference, model.target)
    loops = recurrent_layers(found)
    assert [loop.modules for loop in loops] == modules
    every = [layer for loop in loops for layer in loop.layers]
    assert len(set(every)) == len(every)
    for loop in loops:
        assert len(loop.ends_of_steps) == STEPS
        assert loop.states
        assert set(loop.states) <= set(loop.steps)
        assert set(loop.gates).isdisjoint(loop.states)
        # The first step reads zeros, and nothing after the last step is requantized. All other steps have equal layers.
        sizes = [list(loop.steps.values()).count(step) for step in sorted(set(loop.steps.values()))]
        assert len(set(sizes[1:-1])) == 1
        assert layers_of_a_step in (None, sizes[1])
    outside = {layer.operator.name for layer in found.layers} - {layer.operator.name for layer in every}
    assert not loops or len(outside) <= 5  # the input, and the layers after the loop


@pytest.mark.parametrize("build", [lstm, OwnCell])
def test_analysis(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    found = analyzed(build)
    (loop,) = found.recurrent
    assert loop.steps == len(loop.step_sqnr_db) == STEPS
    assert loop.number is None
    assert loop.error_share is not None
    assert 0 < loop.error_share <= 1
    # In float, the share of the error that is left determines the gain.
    assert loop.gain_db == pytest.approx(-10 * torch.log10(torch.tensor(1 - loop.error_share)).item(), abs=1e-3)
    assert loop.gain_db > max(loop.states_gain_db, loop.weights_gain_db) - 0.5
    codes = [gain.code for gain in loop.gains]
    assert any("per_channel" in code for code in codes)
    assert any("wide=" in code for code in codes) == (build is lstm)
    assert 'recover="auto"' in codes
    assert codes[-1] == "prepare_training(quantized)"
    text = str(found)
    assert f"Recurrent layer {loop.name}, {STEPS} steps" in text
    assert "SQNR dB " in text
    assert json.loads(found.to_json())["recurrent"][0]["steps"] == STEPS
    found.save_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "The recurrent layer was measured" in page
    assert f"SQNR in dB of {STEPS} steps" in page
    assert "prepare_training(quantized)" in page


def test_layers_of_one_module_are_numbered_and_share_options() -> None:
    first, second = sorted(analyzed(Deep).recurrent, key=lambda loop: loop.number or 0)
    assert (first.name, second.name) == ("'network' (number 1)", "'network' (number 2)")
    assert first.gains == second.gains
    assert str(analyzed(Deep)).count("prepare_training") == 1


def test_networks_without_recurrence_have_no_recurrent_layers() -> None:
    assert analyzed(Siamese).recurrent == ()
    assert "Recurrent" not in str(analyzed(Siamese))


def accuracy(share: float, *gains: Gain) -> RecurrentAccuracy:
    return RecurrentAccuracy(("lstm",), None, 40, share, 4.0, 3.0, 1.0, 0.5, (20.0,) * 40, (), gains)


TRAINING = Gain("prepare_training(quantized)", 4.0, "limit: the layer in float")


@pytest.mark.parametrize(
    ("loop", "said"),
    [
        (accuracy(0.6, Gain('wide=["lstm"]', 3.0, "simulated"), TRAINING), 'Try wide=["lstm"] first (+3.0 dB'),
        (accuracy(0.6, Gain('wide=["lstm"]', 0.1, "simulated"), TRAINING), "Try prepare_training(quantized) first"),
        (accuracy(0.05, Gain('wide=["lstm"]', 3.0, "simulated"), TRAINING), "treat all layers"),
    ],
)
def test_verdict(loop: RecurrentAccuracy, said: str) -> None:
    text = advice.verdict((), advice.OutputSqnr(10.0, 20.0, 11.0), [loop])
    assert said in text
    assert ("40 steps" in text) == (loop.error_share == 0.6)


def test_verdict_of_a_healthy_network() -> None:
    assert "No layer needs treatment" in advice.verdict((), advice.OutputSqnr(30.0, 40.0, 30.0), [accuracy(0.9)])

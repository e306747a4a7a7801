"""Recovery of recurrent networks by `convert_pt2e`, and the networks that it leaves as they are."""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tests.flow_support import seeded
from tests.recovery.test_cell_scales import sqnr
from tests.recovery.test_wide_inputs import UNITS as WIDE
from tests.recovery.test_wide_inputs import LogLinear, heavy_tailed
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

from openneutron import NeutronQuantizer, documented_flow, lower, quantize
from openneutron.accuracy.analyze import analyze
from openneutron.core.fx import output_node
from openneutron.documented_flow import RecurrentRecovery
from openneutron.errors import CalibrationError
from openneutron.quantizer import Int8Quantizer, recorded_inputs
from openneutron.quantizer.recorded_inputs import InputRecorder
from openneutron.quantizer.split_inputs import coarse_input
from openneutron.recovery import Recipe, recover_exported, wide_inputs
from openneutron.recovery.recipes import quantize_by_recipe

FRAMES, BANDS, UNITS = 6, 8, 16
BY_THE_SAME_METHODS = Recipe(
    equalizes=False, trusts_samples=False, use_all_samples=False, trains_recurrent_layers=False
)  # fmt: skip

Sample = tuple[Tensor, ...]


class Encoder(nn.Module):
    """Reads the last output of a recurrent network."""

    def __init__(self, network: nn.RNNBase) -> None:
        super().__init__()
        self.network = network
        self.head = nn.Linear(network.hidden_size, 4)

    def forward(self, frames: Tensor) -> Tensor:
        result: Tensor = self.head(self.network(frames)[0][:, -1])
        return result


class Loop(nn.Module):
    """A minimal gated unit as a loop of Python."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.candidate = (nn.Linear(BANDS + UNITS, UNITS) for _ in range(2))

    def forward(self, frames: Tensor) -> Tensor:
        hidden = torch.zeros(len(frames), UNITS)
        for frame in frames.unbind(1):
            gate = torch.sigmoid(self.gate(torch.cat([frame, hidden], 1)))
            hidden = gate * hidden + (1 - gate) * torch.tanh(self.candidate(torch.cat([frame, hidden], 1)))
        return hidden


class CellLoop(nn.Module):
    """Calls a cell in a loop of Python."""

    def __init__(self, cell: nn.LSTMCell | nn.GRUCell) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(UNITS, 4)

    def forward(self, frames: Tensor) -> Tensor:
        hidden = state = torch.zeros(len(frames), UNITS)
        for frame in frames.unbind(1):
            if isinstance(self.cell, nn.LSTMCell):
                hidden, state = self.cell(frame, (hidden, state))
            else:
                hidden = self.cell(frame, hidden)
        result: Tensor = self.head(hidden)
        return result


class FoldedLoop(nn.Module):
    """Calls layers in a loop. Passes fold the norms and the product with a parameter into the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.recurrent, self.layer = nn.LayerNorm(UNITS), nn.Linear(UNITS, UNITS), nn.Linear(BANDS, UNITS)
        self.gate, self.batch_norm = nn.Linear(UNITS, UNITS, bias=False), nn.BatchNorm1d(UNITS)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, UNITS))
        for parameter in (*self.norm.parameters(), *self.batch_norm.parameters()):
            nn.init.uniform_(parameter, 0.5, 1.5)

    def forward(self, frames: Tensor) -> Tensor:
        hidden = torch.zeros(len(frames), UNITS)
        for frame in frames.unbind(1):
            gate = torch.sigmoid(self.batch_norm(self.gate(hidden)))
            hidden = gate * hidden + torch.tanh(self.recurrent(self.norm(hidden)) * self.scale + self.layer(frame))
        return hidden


class Siamese(nn.Module):
    """Applies one layer to two parts of the input, which do not depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(BANDS, 4)

    def forward(self, frames: Tensor) -> Tensor:
        first, last = self.layer(frames[:, 0]), self.layer(frames[:, -1])
        return torch.relu(first) - torch.relu(last)


class Counter(nn.Module):
    """A recurrent network that also keeps a state from one call to the next."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.loop = Loop()
        self.register_buffer("total", torch.zeros(1, UNITS))

    def forward(self, frames: Tensor) -> Tensor:
        self.total.add_(self.loop(frames))
        return self.total * 0.5


def lstm(layers: int = 1) -> Encoder:
    return Encoder(nn.LSTM(BANDS, UNITS, layers, batch_first=True))


RECURRENT: dict[str, Callable[[], nn.Module]] = {
    "lstm": lstm,
    "lstm of two layers": lambda: lstm(2),
    "gru": lambda: Encoder(nn.GRU(BANDS, UNITS, batch_first=True)),
    "rnn": lambda: Encoder(nn.RNN(BANDS, UNITS, batch_first=True)),
    "loop": Loop,
    "loop of LSTM cells": lambda: CellLoop(nn.LSTMCell(BANDS, UNITS)),
    "loop of layers with norms": FoldedLoop,
    "loop of GRU cells": lambda: CellLoop(nn.GRUCell(BANDS, UNITS)),
}


def samples_of(count: int, seed: int = 0) -> list[Sample]:
    """Returns frames of which most values are small and a few are large."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(1, FRAMES, BANDS, generator=generator) ** 3,) for _ in range(count)]


def prepared_by(model: nn.Module, samples: Sequence[Sample], quantizer: Int8Quantizer | None = None) -> GraphModule:
    exported = torch.export.export(model, samples_of(1)[0]).module()
    prepared: GraphModule = prepare_pt2e(exported, quantizer or NeutronQuantizer())
    for sample in samples:
        prepared(*sample)
    return prepared


@torch.no_grad()
def joined(model: Callable[..., Any], samples: Sequence[Sample]) -> Tensor:
    return torch.cat([model(*sample) for sample in samples])


def is_near(wanted: Tensor, found: Tensor) -> bool:
    return torch.equal(wanted, found) or sqnr(wanted, found) > 40


def recorders(prepared: GraphModule) -> list[InputRecorder]:
    return [module for module in prepared.modules() if isinstance(module, InputRecorder)]


@pytest.mark.parametrize("name", RECURRENT)
def test_conversion_applies_the_recipe(name: str) -> None:
    model, samples, tests = seeded(RECURRENT[name]).eval(), samples_of(24), samples_of(12, seed=1)
    converted = convert_pt2e(prepared_by(model, samples, NeutronQuantizer(equalize=False)))
    expected = quantize(
        model, samples[0], samples, recover=BY_THE_SAME_METHODS, equalize=False, batch_size=1, progress=False
    )
    assert is_near(joined(expected.module, tests), joined(converted, tests))
    assert not any("recurrent_recovery" in str(node.target) for node in converted.graph.nodes)
    assert sqnr(joined(model, tests), joined(converted, tests)) > 10
    program = lower(converted, samples[0])
    assert {row.where for row in program.placement} == {"npu"}
    assert sqnr(joined(converted, tests), joined(program.run, tests)) > 30


@pytest.mark.parametrize("recover", [None, "fast"])
@pytest.mark.parametrize("name", [name for name in RECURRENT if name.startswith("loop")])
def test_the_steps_of_a_loop_share_their_weights(name: str, recover: str | None) -> None:
    def bytes_of_codes(frames: int) -> int:
        """Returns the bytes of all int8 constants but numbers, of which each step has its own."""
        samples = [(sample[:, :frames],) for (sample,) in samples_of(4)]
        model = quantize(seeded(RECURRENT[name]).eval(), samples[0], samples, recover=recover, progress=False)
        constants = [value for value in model.module.state_dict().values() if value.dtype == torch.int8]
        return sum(value.numel() for value in constants if value.numel() > 1)

    assert bytes_of_codes(FRAMES) <= bytes_of_codes(3)


@pytest.mark.parametrize(("wide", "inputs"), [(None, ["input"]), ([], [])])
def test_conversion_writes_a_heavy_tailed_input_as_two_tensors(
    wide: list[Any] | None, inputs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wide_inputs, "ENOUGH_DB", 100.0)
    model = seeded(lambda: nn.Sequential(LogLinear(nn.Linear(BANDS, WIDE)), nn.Linear(4, BANDS), lstm())).eval()
    samples = [(heavy_tailed(1, FRAMES, BANDS, seed=seed),) for seed in range(8)]
    converted = convert_pt2e(prepared_by(model, samples, NeutronQuantizer(wide=wide)))
    assert [coarse_input(node) for node in converted.graph.nodes if coarse_input(node)] == inputs


@pytest.mark.parametrize(
    ("build", "quantizer"),
    [
        (Siamese, NeutronQuantizer()),
        (Counter, NeutronQuantizer()),
        (lstm, NeutronQuantizer(correct_bias=False)),
        (lstm, Int8Quantizer()),
    ],
    ids=["no layer depends on another", "states", "correct_bias=False", "Int8Quantizer"],
)
def test_other_networks_get_no_recovery(build: Callable[[], nn.Module], quantizer: Int8Quantizer) -> None:
    assert not recorders(prepared_by(seeded(build).eval(), samples_of(2), quantizer))


def test_training_gets_no_recovery() -> None:
    exported = torch.export.export(seeded(Loop).train(), samples_of(1)[0]).module()
    assert not recorders(prepare_qat_pt2e(exported, NeutronQuantizer(is_qat=True)))


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_graph_of_a_recipe_gets_no_second_recovery(by_hand: bool) -> None:
    samples, quantizer = samples_of(2), NeutronQuantizer()
    graph = quantizer.prepare_graph(torch.export.export(lstm().eval(), samples[0]).module(), equalizes=False)
    if by_hand:
        recover_exported(graph, samples)
    assert not recorders(prepare_pt2e(graph, quantizer.replace(takes_prepared_graphs=not by_hand)))


def test_the_recovery_is_converted_last() -> None:
    prepared = prepared_by(seeded(lstm).eval(), samples_of(1))
    calls = [node for node in prepared.graph.nodes if node.op == "call_module"]
    assert isinstance(prepared.get_submodule(str(calls[-1].target)), RecurrentRecovery)
    assert calls[-1].next is output_node(prepared.graph)


def test_conversions_in_two_threads_restore_the_settings_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each conversion changes filters of warnings and the thresholds of the garbage collection while it runs."""
    prepared = [prepared_by(seeded(lstm).eval(), samples_of(1)) for _ in range(2)]
    both = threading.Barrier(2)

    def overlapping(*arguments: Any) -> Any:
        index = 1
        with contextlib.suppress(threading.BrokenBarrierError):
            index = both.wait(0.5)
        time.sleep(0.5 * index)
        return quantize_by_recipe(*arguments)

    monkeypatch.setattr(documented_flow, "quantize_by_recipe", overlapping)
    before = gc.get_threshold(), list(warnings.filters)
    with ThreadPoolExecutor(2) as pool:
        expected, found = (joined(converted, samples_of(2)) for converted in pool.map(convert_pt2e, prepared))
    assert (gc.get_threshold(), list(warnings.filters)) == before
    assert is_near(expected, found)


def test_copies_of_a_prepared_module_are_converted_alike() -> None:
    samples = samples_of(8)
    prepared = prepared_by(seeded(lstm).eval(), samples)
    copied = copy.deepcopy(prepared)
    expected = joined(convert_pt2e(prepared), samples)
    assert torch.equal(joined(convert_pt2e(copied), samples), expected)


def test_the_state_of_a_prepared_module_has_the_inputs() -> None:
    model, samples = seeded(lstm).eval(), samples_of(3)
    fresh = prepare_pt2e(torch.export.export(model, samples[0]).module(), NeutronQuantizer())
    fresh.load_state_dict(prepared_by(model, samples).state_dict())
    (recorder,) = recorders(fresh)
    assert [value.tolist() for (value,) in recorder.samples] == [value.tolist() for (value,) in samples]


@pytest.mark.parametrize("calibrates", [False, True])
@pytest.mark.parametrize("converts", [False, True])
def test_inference_mode_changes_nothing(calibrates: bool, converts: bool) -> None:
    model, samples = seeded(lstm).eval(), samples_of(8)
    expected = joined(convert_pt2e(prepared_by(model, samples)), samples)
    prepared = prepared_by(model, [])
    with torch.inference_mode(calibrates):
        for sample in samples_of(8):
            prepared(*sample)
    with torch.inference_mode(converts):
        converted = convert_pt2e(prepared)
    assert is_near(expected, joined(converted, samples))


def test_constants_that_were_replaced_after_preparation_are_used() -> None:
    model, samples = seeded(lstm).eval(), samples_of(8)
    prepared = prepared_by(model, samples[:1])
    halved = {name: value / 2 if name == "head.weight" else value for name, value in prepared.state_dict().items()}
    prepared.load_state_dict(halved, assign=True)
    for sample in samples[1:]:
        prepared(*sample)
    with torch.no_grad():
        model.get_parameter("head.weight").div_(2)
    assert sqnr(joined(model, samples), joined(convert_pt2e(prepared), samples)) > 20


def test_analysis_compares_a_recovered_module_with_its_model() -> None:
    model, samples = seeded(lambda: lstm(2)).eval(), samples_of(32)
    converted = convert_pt2e(prepared_by(model, samples))
    layers = analyze(model, converted, samples[:4]).layers
    assert {layer.op for layer in layers} >= {"aten.linear.default", "aten.tanh.default"}
    assert min(layer.sqnr_db for layer in layers) > 5


def test_calibration_that_is_not_finite_is_refused() -> None:
    samples = [*samples_of(2), (torch.full((1, FRAMES, BANDS), torch.nan),)]
    with pytest.raises(CalibrationError, match="NaN"):
        convert_pt2e(prepared_by(seeded(lstm).eval(), samples))


def test_recorders_of_parts_merge_to_that_of_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_inputs, "RECORDED_BYTES", 5 * 12)
    stream = [(torch.full((1, 3), float(index)), 7) for index in range(8)]
    whole, first, second = (InputRecorder([1, None]) for _ in range(3))
    for index, inputs in enumerate(stream):
        whole(*inputs)
        (first if index < 4 else second)(*inputs)
    first.merge(second.state())
    assert [float(value[0, 0]) for value, _ in whole.samples] == [0, 1, 2, 3, 4]
    for ours, theirs in zip(whole.samples, first.samples, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert ours[1] == theirs[1] == 7


def test_a_recorder_splits_batches_and_copies_samples() -> None:
    recorder = InputRecorder([2, None])
    batch = torch.arange(18.0).reshape(6, 3)
    recorder(batch, torch.tensor(1.0))
    batch.zero_()
    assert [value.shape for value, _ in recorder.samples] == [(2, 3)] * 3
    assert torch.equal(torch.cat([value for value, _ in recorder.samples]), torch.arange(18.0).reshape(6, 3))
    assert len(recorder.state()["samples"]) == 3


def test_one_sample_is_kept_whatever_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_inputs, "RECORDED_BYTES", 4)
    recorder = InputRecorder([1])
    recorder(torch.ones(1, 8))
    recorder(torch.ones(1, 1))
    assert [value.shape for (value,) in recorder.samples] == [(1, 8)]

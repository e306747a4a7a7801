"""Models with state in buffers: calibration, lowering, and many calls of the `.pte`."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from tests import state_models as models
from tests.flow_support import convert, lower_documented, seeded
from torch import nn
from torch.utils._pytree import tree_leaves
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

import openneutron
from openneutron import NeutronQuantizer, QuantizedModel, Stream, lower, quantize
from openneutron.accuracy import analyze, evaluate
from openneutron.errors import CalibrationError, ModelError, OptionError
from openneutron.model.state import states_of, store_of, write_of
from openneutron.passes import hold_states
from openneutron.quantizer import UnquantizedWarning
from openneutron.runtime.program import TensorInfo

STEPS = 40

# For each model: the least SQNR of its outputs in dB, and the operators on the CPU.
MODELS: dict[str, tuple[float, list[str]]] = {
    "RingBuffer": (35, ["copy_"]),
    "Copied": (35, ["copy_"]),
    "Filled": (35, ["copy_"]),
    "DelayLine": (33, ["clone", "copy_", "copy_"]),
    "InputKept": (30, ["copy_"]),
    "Gru": (25, ["copy_"]),
    "Lstm": (33, ["copy_", "copy_"]),
    "Attention": (30, ["copy_", "copy_"]),
    "Shifted": (33, ["copy_"]),
    "Counter": (35, ["add", "clone", "copy_"]),
    "Returned": (30, ["clone", "copy_"]),
}


def built(name: str) -> Any:
    return getattr(models, name)().eval()


@torch.no_grad()
def outputs(run: Callable[..., Any], steps: Iterable[models.Inputs]) -> torch.Tensor:
    """Returns [steps, values]: all outputs of each call."""
    found = [torch.cat([leaf.flatten().float() for leaf in tree_leaves(run(*inputs))]) for inputs in steps]
    return torch.stack(found)


def sqnr_db(wanted: torch.Tensor, found: torch.Tensor) -> float:
    noise = (wanted - found).double().square().sum()
    return math.inf if not noise else float(10 * torch.log10(wanted.double().square().sum() / noise))


def quantized_in(flow: str, model: Any, steps: list[models.Inputs], recover: str | None = None) -> QuantizedModel:
    """Quantizes the model in one of the two flows, calibrated on two streams."""
    half = len(steps) // 2
    if flow == "short":
        return quantize(model, steps[0], [Stream(steps[:half]), Stream(steps[half:])], recover=recover)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnquantizedWarning)
        prepared = prepare_pt2e(torch.export.export(model, steps[0]).module(), NeutronQuantizer("imxrt700"))
    for part in (steps[:half], steps[half:]):
        openneutron.reset(prepared)
        for inputs in part:
            prepared(*inputs)
    return QuantizedModel(convert_pt2e(prepared), steps[0], "imxrt700")


class TestEveryFormOfState:
    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.filterwarnings("ignore::openneutron.quantizer.UnquantizedWarning")
    def test_the_program_agrees_with_the_model_on_a_stream(self, name: str) -> None:
        model, floor, left = built(name), *MODELS[name]
        steps = models.stream(model, STEPS)
        wanted = outputs(copy.deepcopy(model), steps)
        quantized = quantized_in("short", model, steps)
        program = lower(quantized)
        found = outputs(program.run, steps)
        assert sqnr_db(wanted, found) > floor
        assert sqnr_db(outputs(quantized, steps), found) > 60
        cpu = [row.op.split(".")[1] for row in program.placement if row.where == "cpu"]
        assert [name.replace("_clone_dim_order", "clone") for name in cpu] == left
        assert {row.partition for row in program.placement if row.where == "npu"} == {0}

    @pytest.mark.parametrize("recover", ["fast", "auto"])
    @pytest.mark.parametrize("name", ["RingBuffer", "Gru"])
    def test_recovery_takes_each_step_with_its_state(self, name: str, recover: str) -> None:
        model = built(name)
        steps = models.stream(model, STEPS)
        wanted = outputs(copy.deepcopy(model), steps)
        plain = quantized_in("short", model, steps)
        recovered = quantized_in("short", model, steps, recover)
        assert sqnr_db(wanted, outputs(recovered, steps)) > sqnr_db(wanted, outputs(plain, steps)) - 1


class TestStreams:
    @pytest.mark.parametrize("flow", ["short", "documented"])
    def test_two_hundred_steps_equal_the_stateless_form(self, flow: str) -> None:
        model = models.RingBuffer().eval()
        steps = models.stream(model, 200)
        recording = torch.cat([frame for (frame,) in steps], -1)
        with torch.no_grad():
            wanted = model.whole(recording)[0].T
        quantized = quantized_in(flow, model, steps)
        program = lower(quantized)
        found = outputs(program.run, steps)
        stateless = quantize(models.Whole(model).eval(), (recording,), [recording], recover=None)
        assert sqnr_db(wanted, found) > sqnr_db(wanted, outputs(stateless, [(recording,)]).reshape(5, 200).T) - 2
        assert sqnr_db(wanted[-50:], found[-50:]) > sqnr_db(wanted[:50], found[:50]) - 3

    def test_both_flows_find_the_same_qparams(self) -> None:
        model = models.RingBuffer().eval()
        steps = models.stream(model, STEPS)
        short, documented = (quantized_in(flow, model, steps) for flow in ("short", "documented"))
        torch.testing.assert_close(outputs(short, steps), outputs(documented, steps))

    def test_reset_begins_again(self) -> None:
        model = models.Filled().eval()
        steps = models.stream(model, 5)
        quantized = quantized_in("short", model, steps)
        program = lower(quantized)
        loaded = load_bytes(program)
        runs: list[tuple[Any, Callable[..., Any]]] = [
            (quantized, quantized), (program, program.run), (loaded, loaded.run),
        ]  # fmt: skip
        for run, call in runs:
            first, second = outputs(call, steps), outputs(call, steps)
            run.reset()
            assert torch.equal(outputs(call, steps), first)
            assert not torch.equal(first, second)

    def test_strict_export(self) -> None:
        model = models.Copied().eval()
        steps = models.stream(model, STEPS)
        quantized = quantize(model, steps[0], steps, recover=None, strict=True)
        assert sqnr_db(outputs(model, steps), outputs(lower(quantized).run, steps)) > 35

    def test_a_model_is_not_changed(self) -> None:
        model = models.Filled().eval()
        before = model.cache.clone()
        quantized = quantized_in("short", model, models.stream(model, 5))
        outputs(quantized, models.stream(model, 5))
        assert torch.equal(model.cache, before)

    def test_a_program_begins_with_the_initial_state_of_the_model(self) -> None:
        model = models.Filled().eval()
        steps = models.stream(model, 5)
        quantized = quantized_in("short", model, steps)
        first = outputs(quantized, steps)
        assert torch.equal(outputs(lower(quantized).run, steps), first)

    def test_the_documented_flow(self) -> None:
        model = models.Filled().eval()
        steps = models.stream(model, STEPS)
        converted = convert(model, steps[0], calibration=steps)
        lowered = lower_documented(converted, steps[0])
        program = openneutron.runtime.HostProgram.from_bytes(lowered.pte)
        assert lowered.delegates == 1
        assert sqnr_db(outputs(converted, steps), outputs(program.run, steps)) > 60

    @pytest.mark.parametrize(
        "options", [{"batch_size": 1}, {"batch_size": 8}, pytest.param({"jobs": 2}, marks=pytest.mark.slow)], ids=str
    )
    def test_jobs_and_batches_give_the_ranges_of_one_process(self, options: dict[str, Any]) -> None:
        model = models.RingBuffer().eval()
        steps = models.stream(model, STEPS)
        one, other = (quantize(model, steps[0], steps, recover=None, **more) for more in ({}, options))
        torch.testing.assert_close(outputs(other, steps[:5]), outputs(one, steps[:5]))

    def test_items_must_all_be_streams(self) -> None:
        model = models.RingBuffer().eval()
        steps = models.stream(model, 4)
        with pytest.raises(CalibrationError, match="Item 1 of the data is not a Stream"):
            quantize(model, steps[0], [Stream(steps[:2]), steps[2]])

    def test_streams_of_a_model_without_state_are_its_samples(self) -> None:
        model = nn.Linear(4, 3).eval()
        inputs = [torch.randn(1, 4, generator=torch.Generator().manual_seed(0)) for _ in range(4)]
        one = quantize(model, (inputs[0],), [Stream(inputs[:2]), Stream(inputs[2:])], recover=None)
        other = quantize(model, (inputs[0],), inputs, recover=None)
        assert torch.equal(one(inputs[0]), other(inputs[0]))


class TestOtherStates:
    def test_a_write_at_an_input_index_runs_on_the_cpu(self) -> None:
        model = models.Written().eval()
        generator = torch.Generator().manual_seed(0)
        steps = [(torch.randn(1, 8, generator=generator), torch.tensor([step % 4])) for step in range(STEPS)]
        wanted = outputs(copy.deepcopy(model), steps)
        with pytest.warns(UnquantizedWarning, match="index_copy"):
            program = lower(quantize(model, steps[0], steps, recover=None))
        assert sqnr_db(wanted, outputs(program.run, steps)) > 30
        assert [row.op for row in program.placement if row.where == "cpu"][-1] == "aten.copy_.default"

    def test_a_state_that_is_left_in_float(self) -> None:
        model = models.Gru().eval()
        steps = models.stream(model, STEPS)
        quantized = quantize(model, steps[0], steps, recover=None, layers={"cell": "float"})
        program = lower(quantized)
        assert sqnr_db(outputs(copy.deepcopy(model), steps), outputs(quantized, steps)) > 40
        quantized.reset()
        assert sqnr_db(outputs(quantized, steps), outputs(program.run, steps)) > 60

    def test_int8_at_the_ends(self) -> None:
        model = models.RingBuffer().eval()
        steps = models.stream(model, STEPS)
        quantized = quantized_in("short", model, steps)
        program = lower(quantized, int8_io=True)
        take, give = (info for info in (*program.inputs, *program.outputs) if isinstance(info, TensorInfo))
        found = outputs(lambda x: give.dequantize(program.run(take.quantize(x))), steps)
        assert sqnr_db(outputs(quantized, steps), found) > 60

    def test_training_step_by_step(self) -> None:
        model = models.Copied().train()
        steps = models.stream(model, 10)
        exported = torch.export.export(model, steps[0]).module()
        prepared = prepare_qat_pt2e(exported, NeutronQuantizer("imxrt700", is_qat=True))
        for inputs in steps:
            prepared(*inputs).square().sum().backward()
        converted = convert_pt2e(prepared)
        assert not converted.cache.any()
        assert sqnr_db(outputs(converted, steps), outputs(lower(converted, steps[0]).run, steps)) > 60

    def test_a_program_that_reads_its_own_write(self) -> None:
        class Shifts(nn.Module):
            cache: torch.Tensor

            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(4, 3)
                self.register_buffer("cache", torch.zeros(3, 4))

            def forward(self, x: torch.Tensor) -> Any:
                self.cache[:-1] = self.cache[1:].clone()
                self.cache[-1:] = x
                return self.linear(self.cache)

        model = seeded(Shifts)
        steps = [(torch.randn(1, 4, generator=torch.Generator().manual_seed(step)),) for step in range(5)]
        lowered = lower_documented(torch.export.export(model, steps[0]).module(), steps[0])
        program = openneutron.runtime.HostProgram.from_bytes(lowered.pte)
        torch.testing.assert_close(outputs(program.run, steps), outputs(model, steps))


class Nested(nn.Module):
    """A model with a submodule that assigns to its buffer, and returns the previous value."""

    frame = (1, 4, 1)

    def __init__(self) -> None:
        super().__init__()
        self.part = models.RingBuffer()

    def forward(self, x: torch.Tensor) -> Any:
        before = self.part.cache
        return self.part(x), before


class TestPartsThatAssign:
    """torch.export loses assignments to buffers in submodules."""

    def test_short_flow(self) -> None:
        model = Nested().eval()
        steps = models.stream(model, STEPS)
        wanted = outputs(copy.deepcopy(model), steps)
        assert sqnr_db(wanted, outputs(lower(quantized_in("short", model, steps)).run, steps)) > 35
        assert not model.part.cache.any()

    def test_documented_flow(self) -> None:
        model = Nested().eval()
        steps = models.stream(model, STEPS)
        with openneutron.keep_assignments(model):
            exported = torch.export.export(model, steps[0])
        assert sqnr_db(outputs(copy.deepcopy(model), steps), outputs(exported.module(), steps)) > 100

    def test_a_state_that_grows(self) -> None:
        class Grows(models.RingBuffer):
            def store(self, frames: torch.Tensor) -> None:
                self.cache = torch.cat([self.cache, frames], -1)

        model = Nested()
        model.part = Grows()
        with pytest.raises(ModelError, match=r"'cache' of shape \(1, 8, 2\), but the shape of a state is fixed"):
            quantize(model.eval(), models.stream(model, 1)[0], models.stream(model, 2))

    def test_a_call_that_fails_leaves_the_buffer(self) -> None:
        class Fails(Nested):
            def forward(self, x: torch.Tensor) -> Any:
                self.part(x)
                return x @ x

        model = Fails().eval()
        with pytest.raises(RuntimeError), openneutron.keep_assignments(model):
            model(torch.ones(model.frame))
        assert not model.part.cache.any()


class TestAccuracy:
    def test_an_analysis_takes_each_step_with_its_state(self) -> None:
        model = models.RingBuffer().eval()
        steps = models.stream(model, 12)
        quantized = quantized_in("short", model, steps)
        streams = [Stream(steps[:6]), Stream(steps[6:])]
        found = analyze(None, quantized, streams, program=lower(quantized))
        assert found.output_sqnr_db > 30
        assert found.samples == 12
        assert found.comparison is not None
        assert found.comparison.output_lsb == 0
        assert all(layer.lsb <= 1 for layer in found.comparison.layers)

    @pytest.mark.parametrize("form", ["module", "quantized", "program", "loaded"])
    def test_evaluation_begins_each_stream_anew(self, form: str) -> None:
        model = models.Filled().eval()
        steps = models.stream(model, 4)
        quantized = quantized_in("short", model, steps)
        program = lower(quantized)
        run = {"module": quantized.module, "quantized": quantized, "program": program, "loaded": load_bytes(program)}[
            form
        ]
        pairs = [(inputs, 0) for inputs in steps]

        def total(value: torch.Tensor, _: object) -> float:
            return float(value.sum())

        once = evaluate(run, [Stream(pairs)], metric=total)
        assert evaluate(run, [Stream(pairs), Stream(pairs)], metric=total) == pytest.approx(once)
        with pytest.raises(OptionError, match="jobs=1"):
            evaluate(run, pairs, metric=total, jobs=2)


def load_bytes(program: openneutron.NeutronProgram) -> openneutron.runtime.HostProgram:
    return openneutron.runtime.HostProgram.from_bytes(program.portable)


class WritesToParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.weight.mul_(0.5)
        return x * self.weight


class TestRefused:
    def test_a_write_to_a_parameter(self) -> None:
        with pytest.raises(ModelError, match=r"writes to the parameter 'weight'.*register_buffer.*test_state"):
            quantize(WritesToParameter().eval(), (torch.ones(1, 4),), [torch.ones(1, 4)])

    def test_a_write_that_strict_export_loses_is_refused(self) -> None:
        model = models.RingBuffer().eval()
        with pytest.raises(ModelError, match=r"self\.cache\.copy_"):
            quantize(model, models.stream(model, 1)[0], models.stream(model, 2), strict=True)

    def test_a_buffer_that_is_assigned_an_input(self) -> None:
        class Assigns(models.InputKept):
            def forward(self, x: torch.Tensor) -> Any:
                change = x - self.last
                self.last = x
                return self.linear(change)

        with pytest.raises(ModelError, match=r"self\.last\.copy_\(x\)"):
            quantize(Assigns().eval(), (torch.ones(1, 6),), [torch.ones(1, 6)])

    def test_reset_of_a_model(self) -> None:
        with pytest.raises(ModelError, match="Reset the buffers of the float model yourself"):
            openneutron.reset(models.RingBuffer())


class TestHoldStates:
    @staticmethod
    def exported(model: Any) -> Any:
        return torch.export.export(model, models.stream(model, 1)[0]).module()

    def test_a_graph_that_writes_nothing_stays(self) -> None:
        class Stateless(models.InputKept):
            def forward(self, x: torch.Tensor) -> Any:
                return self.linear(torch.relu_(x - self.last))

        module = self.exported(Stateless().eval())
        before = str(module.graph)
        assert not hold_states(module)
        assert str(module.graph) == before

    def test_a_buffer_is_read_first_and_written_last(self) -> None:
        module = self.exported(models.Shifted().eval())
        assert hold_states(module)
        assert not hold_states(module)
        (state,) = states_of(module.graph)
        assert store_of(state).users.keys() == {state, write_of(state)}
        assert write_of(state).next.op == "output"

    @pytest.mark.parametrize("view", ["transpose(1, 2)", "mT", "permute(0, 2, 1)", "swapaxes(-1, -2)", "movedim(1, 2)"])
    def test_views_of_square_states_stay_when_a_graph_is_prepared_again(self, view: str) -> None:
        class Square(nn.Module):
            last: torch.Tensor

            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("last", torch.zeros(1, 4, 4))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                self.last = torch.cat([self.last[:, 1:], x], 1)
                moved: torch.Tensor = eval(f"last.{view}", {"last": self.last})
                return x @ moved

        model, steps = Square().eval(), [(torch.randn(1, 1, 4),) for _ in range(STEPS)]
        quantizer = NeutronQuantizer("imxrt700")
        graph = torch.export.export(copy.deepcopy(model), steps[0]).module()
        for _ in range(2):
            graph = quantizer.transform_for_annotation(graph)
        torch.testing.assert_close(outputs(graph, steps), outputs(model, steps))

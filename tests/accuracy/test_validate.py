"""Validation of a `.pte` against the float model and the converted module."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from openneutron import NeutronProgram, QuantizedModel, build, lower, quantize
from openneutron.accuracy import validate
from openneutron.accuracy.board_outputs import validate_board
from openneutron.accuracy.compare_programs import compare_outputs
from openneutron.accuracy.validate import DifferenceSum
from openneutron.errors import ConverterError, InputError, ModelError, OptionError
from openneutron.partition import placing
from openneutron.workflow import building


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.conv(x).relu().mean((2, 3))
        return {"scores": self.head(features), "features": features}


@dataclasses.dataclass(frozen=True)
class Case:
    model: nn.Module
    data: list[torch.Tensor]
    quantized: QuantizedModel


@pytest.fixture(scope="module")
def case() -> Case:
    torch.manual_seed(0)
    model, data = Net().eval(), [torch.randn(1, 3, 6, 6) for _ in range(8)]
    return Case(model, data, quantize(model, (data[0],), data, recover=None))


@pytest.mark.parametrize("int8_io", [False, True])
def test_each_output_has_a_row_for_each_reference(case: Case, int8_io: bool) -> None:
    program = lower(case.quantized, int8_io=int8_io)
    found = validate(program, None, case.data, quantized=case.quantized)
    assert [(row.output, row.reference) for row in found.outputs] == [
        (0, "float"), (1, "float"), (0, "int8"), (1, "int8"),
    ]  # fmt: skip
    for row in found.outputs:
        assert row.sqnr_db > (25 if row.reference == "float" else 40)
        assert row.cosine == pytest.approx(1, abs=1e-2)
        assert row.lsb is not None
        assert row.lsb <= (8 if row.reference == "float" else 1.01)
    assert found.passed
    assert found.samples == 8
    assert found.layers is not None
    assert "features against float" in str(found)


def test_the_sqnr_compares_the_outputs(case: Case) -> None:
    program = lower(case.quantized)
    found = validate(program.buffer, case.model, case.data)
    with torch.no_grad():
        wanted = torch.cat([case.model(x)["scores"] for x in case.data])
    given = torch.cat([program.run(x)[0] for x in case.data])
    expected = 10 * math.log10(float(wanted.square().sum() / (given - wanted).square().sum()))
    assert found.outputs[0].sqnr_db == pytest.approx(expected, abs=1e-3)
    assert found.outputs[0].largest == pytest.approx(float((given - wanted).abs().max()))
    assert found.layers is None


def test_without_data_the_inputs_are_random(case: Case) -> None:
    program = lower(case.quantized)
    found = validate(program, case.model, samples=3)
    assert found.samples == 3
    assert found == validate(program, case.model, samples=3)


def test_limits(case: Case) -> None:
    program = lower(case.quantized)
    found = validate(program, None, case.data, quantized=case.quantized, min_sqnr_db=90, max_lsb=-1)
    assert not found.passed
    assert len(found.failures) == 4
    assert "less than 90 dB" in str(found)


def test_a_float_model_with_nan_fails_without_limits(case: Case) -> None:
    broken = copy.deepcopy(case.model)
    with torch.no_grad():
        next(broken.parameters()).fill_(math.nan)
    found = validate(lower(case.quantized), broken, case.data)
    assert not found.passed
    assert "of the float model has values that are not finite. Check the weights" in found.failures[0]


INF = math.inf


@pytest.mark.parametrize(
    ("pairs", "is_finite"),
    [
        ([(1.0, math.nan), (1.0, 1.0)], False),
        ([(1.0, 1.0), (math.nan, 1.0)], False),
        ([(1.0, INF), (1.0, 1.0)], False),
        ([(INF, 1.0)], False),
        ([(INF, -INF)], False),
        ([(-INF, -INF), (2.0, 2.0)], True),
    ],
)
def test_values_that_are_not_finite(pairs: list[tuple[float, float]], is_finite: bool) -> None:
    found = DifferenceSum("float", 0, 0.5, "output0")
    for value, wanted in pairs:
        found.add(torch.tensor([value, 3.0]), torch.tensor([wanted, 3.0]))
    row = found.row()
    assert math.isnan(row.largest) != is_finite
    assert (row.sqnr_db == -INF) != is_finite
    assert is_finite == (row.lsb == 0)


def test_another_program_fails(case: Case) -> None:
    """The program of a model with other weights differs from the float model."""
    torch.manual_seed(1)
    other = lower(quantize(Net().eval(), (case.data[0],), case.data, recover=None))
    assert not validate(other, case.model, case.data, min_sqnr_db=20).passed


def test_state_is_reset_before_each_stream() -> None:
    class Sum(nn.Module):
        total: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(1, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.total = (0.5 * self.total + x).clamp(-4, 4)
            return self.total * 1.0

    torch.manual_seed(0)
    data = [torch.randn(1, 4) for _ in range(8)]
    model = Sum().eval()
    quantized = quantize(model, (data[0],), data, recover=None)
    program = lower(quantized)
    first = validate(program, None, data, quantized=quantized)
    assert first.outputs[0].sqnr_db > 25
    assert validate(program, None, data, quantized=quantized) == first


def wrong_model(case: Case) -> Any:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()


class TestRefusals:
    def test_no_reference(self, case: Case) -> None:
        with pytest.raises(ModelError, match="needs the float model"):
            validate(lower(case.quantized))

    def test_another_model_is_refused(self, case: Case) -> None:
        with pytest.raises(ModelError, match="Give the model that the program was lowered from"):
            validate(lower(case.quantized), wrong_model(case), case.data)

    def test_a_model_in_train_mode(self, case: Case) -> None:
        with pytest.raises(ModelError, match="train mode"):
            validate(lower(case.quantized), Net(), case.data)

    def test_data_of_another_shape(self, case: Case) -> None:
        with pytest.raises(InputError):
            validate(lower(case.quantized), case.model, [torch.randn(1, 3, 7, 7)])

    def test_empty_data(self, case: Case) -> None:
        with pytest.raises(InputError, match="data are empty"):
            validate(lower(case.quantized), case.model, [])

    @pytest.mark.parametrize("options", [
        {"samples": 0}, {"samples": True}, {"min_sqnr_db": "20"}, {"max_lsb": True},
        {"min_sqnr_db": math.nan}, {"max_lsb": math.nan},
    ])  # fmt: skip
    def test_options(self, case: Case, options: dict[str, Any]) -> None:
        program: NeutronProgram = lower(case.quantized)
        with pytest.raises(OptionError):
            validate(program, case.model, **options)


def test_build_takes_a_generator_and_names_missing_packages(
    case: Case, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build(case.model, (case.data[0],), iter(case.data), recover=None)
    assert built.validation is not None
    assert built.validation.samples == len(case.data)
    assert built.analysis is not None
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jinja2" else found(name))
    with pytest.raises(OptionError, match="The report needs jinja2"):
        build(case.model, (case.data[0],), case.data, tmp_path, recover=None)
    with pytest.raises(OptionError, match=r"has no option 'recovr'\. Did you mean 'recover'"):
        build(case.model, (case.data[0],), case.data, recovr=None)


def test_random_inputs_that_need_too_much_memory_are_refused(case: Case) -> None:
    program = lower(case.quantized).buffer
    for call in (
        lambda: validate(program, case.model, samples=10**12),
        lambda: compare_outputs(program, program, samples=10**12),
        lambda: validate_board(program, b"", samples=10**12),
    ):
        with pytest.raises(OptionError, match=r"1,000,000,000,000 random samples have .* Give at most [\d,]+\."):
            call()


def test_a_missing_converter_is_reported_before_the_quantization(
    case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def not_yet(*_: Any, **__: Any) -> None:
        raise AssertionError("a long step began")

    monkeypatch.setattr(building, "quantize", not_yet)
    monkeypatch.setattr(placing, "place", not_yet)
    missing: Any = {"payload": "device", "neutron_converter_flavor": "SDK_24_01"}
    with pytest.raises(ConverterError, match="no converter for neutron_converter_flavor='SDK_24_01'"):
        build(case.model, case.data[0], case.data, tmp_path / "out", **missing)
    with pytest.raises(ConverterError, match="no converter for neutron_converter_flavor='SDK_24_01'"):
        lower(case.quantized, payload="device", neutron_converter_flavor="SDK_24_01")
    assert not (tmp_path / "out").exists()

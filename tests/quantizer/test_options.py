"""Options for quantization and delegation: observers, granularity by SDK, names of operators."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.flow_support import convert, lower_documented, seeded, worst_lsb
from tests.models import trained
from torch import nn
from torchao.quantization.pt2e import fake_quantize, observer
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from openneutron import (
    NeutronPartitioner,
    NeutronQuantizer,
    QuantizedModel,
    generate_neutron_compile_spec,
    lower,
    quantize,
)
from openneutron.errors import OptionError
from openneutron.partition.partitioner import CpuWarning
from openneutron.quantizer import UnquantizedWarning
from openneutron.targets import takes_weights_per_channel


def image(seed: int = 0) -> torch.Tensor:
    return torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(seed))


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5))


class HalfRange(observer.MinMaxObserver):  # type: ignore[misc]
    """A user-defined observer."""

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        scale, zero_point = super().calculate_qparams()
        return scale / 2, zero_point


OBSERVERS: dict[str, tuple[Any, type[nn.Module]]] = {
    "histogram": (observer.HistogramObserver, observer.HistogramObserver),
    "histogram of 64 bins": (observer.HistogramObserver.with_args(bins=64), observer.HistogramObserver),
    "moving average": (observer.MovingAverageMinMaxObserver, observer.MovingAverageMinMaxObserver),
    "slow moving average": (
        observer.MovingAverageMinMaxObserver.with_args(averaging_constant=0.5), observer.MovingAverageMinMaxObserver,
    ),
    "extremes": (observer.MinMaxObserver, observer.MinMaxObserver),
    "fake quantization": (fake_quantize.FakeQuantize, fake_quantize.FakeQuantize),
    "a user's own": (HalfRange, HalfRange),
}  # fmt: skip


class TestObserver:
    @pytest.mark.parametrize("name", OBSERVERS)
    def test_a_chosen_observer_observes_every_activation(self, name: str) -> None:
        chosen, kind = OBSERVERS[name]
        module = torch.export.export(seeded(small), (image(),)).module()
        prepared = prepare_pt2e(module, NeutronQuantizer(observer=chosen))
        assert sum(type(child) is kind for child in prepared.children()) == 3
        model = quantize(seeded(small), (image(),), [image(), image(1)], observer=chosen)
        program = lower(model)
        assert {row.where for row in program.placement} == {"npu"}
        assert worst_lsb(model.module, program.run, [(image(),), (image(2),)]) <= 1

    def test_arguments_of_a_chosen_observer_have_effect(self) -> None:
        model = seeded(small)
        (calibration,) = ([image(), 4 * image(1)],)
        scales = []
        for constant in (0.01, 0.5):
            chosen = observer.MovingAverageMinMaxObserver.with_args(averaging_constant=constant)
            module = quantize(model, (image(),), calibration, observer=chosen).module
            (first, *_) = (node for node in module.graph.nodes if ".quantize_per_tensor" in str(node.target))
            scales.append(first.args[1])
        assert scales[1] > 1.5 * scales[0]

    @pytest.mark.parametrize(
        ("nonsense", "message"),
        [
            (3, "not 3"),
            ("HistogramObserver", "not 'HistogramObserver'"),
            (nn.ReLU, "not <class"),
            (F.relu, "not <function"),
            (observer.HistogramObserver(), "not HistogramObserver"),
            (observer.HistogramObserver.with_args(bin=3), "unexpected keyword argument 'bin'"),
            (observer.PerChannelMinMaxObserver, "qscheme only support"),
            (observer.FixedQParamsObserver, "missing 2 required positional arguments"),
            (observer.PlaceholderObserver, "calculate_qparams should not be called"),
            (observer.NoopObserver, "unexpected keyword argument"),
            (observer.RecordingObserver, "unexpected keyword argument"),
            (torch.ao.quantization.observer.HistogramObserver, r"of torch\.ao\.quantization\.observer"),
        ],
        ids=lambda value: re.sub(" at 0x.*", "", str(value))[:50],
    )
    def test_invalid_options_are_refused_by_the_constructor(self, nonsense: Any, message: str) -> None:
        with pytest.raises(OptionError, match="observer takes a class of torchao.*" + message):
            NeutronQuantizer(observer=nonsense)


class TestWeightsPerChannel:
    @pytest.mark.parametrize(
        ("flavor", "expected"),
        [
            (None, True), ("SDK_25_03", False), ("SDK_25_06", False), ("SDK_25_09", True), ("SDK_25_12", True),
            ("SDK_26_03", True), ("3.0.0", True), ("3.1.3", True),
        ],
    )  # fmt: skip
    def test_releases_that_take_weights_per_channel(self, flavor: str | None, expected: bool) -> None:
        assert takes_weights_per_channel(flavor) is expected

    @pytest.fixture(scope="class")
    def model(self) -> QuantizedModel:
        convolutions = nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1)
        blocks = seeded(lambda: nn.Sequential(*convolutions, nn.Flatten(2), nn.Conv1d(8, 8, 1)))
        return quantize(blocks, (image(),), [image()], layers={"2": "per_channel", nn.Conv1d: "per_channel"})

    @pytest.mark.parametrize("flavor", ["SDK_25_03", "SDK_25_06"])
    def test_older_converters_are_refused_with_what_to_do(self, model: QuantizedModel, flavor: str) -> None:
        program = lower(model, neutron_converter_flavor=flavor)
        reason = (
            f"Its weight is quantized per channel. neutron_converter_flavor '{flavor}' supports only weights that are "
            "quantized per tensor; SDK_25_09 is the first that supports both. Quantize the weight per tensor with the "
            "quantizer's option weight_granularity or layers."
        )
        assert [row.module for row in program.placement if row.reason == reason] == ["2", "4"]
        assert {row.module for row in program.placement if row.where == "npu"} >= {"0"}
        assert worst_lsb(model.module, program.run, [(image(1),)]) <= 1

    def test_newer_converters_take_weights_per_channel(self, model: QuantizedModel) -> None:
        for flavor in ("SDK_25_09", "SDK_25_12", "3.1.1", None):
            rows = lower(model, neutron_converter_flavor=flavor).placement
            assert {row.where for row in rows} == {"npu"}, flavor


class Written(nn.Module):
    """A model with operators that passes decompose."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(4, 4, 1), trained(nn.BatchNorm2d(4)), nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.conv(F.relu_(self.conv(self.norm(self.act(self.conv(x))))) / 2)
        return result


class TestOperatorsNotToDelegate:
    @pytest.fixture(scope="class")
    def model(self) -> QuantizedModel:
        return quantize(seeded(Written), (image(),), [image()])

    @pytest.mark.parametrize(
        ("name", "became"),
        [
            ("aten.silu.default", ["sigmoid", "mul"]), ("aten::silu", ["sigmoid", "mul"]),
            ("aten.silu", ["sigmoid", "mul"]), ("aten::batch_norm", ["conv2d_1"]), ("aten.div.Tensor", ["mul_1"]),
            ("aten::relu_", ["relu"]), ("aten::sigmoid", ["sigmoid"]), ("aten::mul", ["mul", "mul_1"]),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("strict", [False, True])
    def test_the_name_of_a_replaced_operator_includes_its_replacements(
        self, model: QuantizedModel, name: str, became: list[str], strict: bool
    ) -> None:
        rows = lower(model, operators_not_to_delegate=[name]).placement
        left = [row for row in rows if row.where == "cpu"]
        assert [row.node for row in left if row.reason == f"'{name}' is in operators_not_to_delegate."] == became
        documented = convert(seeded(Written), (image(),), strict=strict)
        lowered = lower_documented(documented, (image(),), strict=strict, operators_not_to_delegate=[name])
        assert len(lowered.cpu) == len(left)
        assert worst_lsb(documented, lowered.run, [(image(1),)]) <= 1

    def test_names_of_decomposed_operators_are_known_in_any_model(self) -> None:
        model = quantize(seeded(small), (image(),), [image()])
        rows = lower(model, operators_not_to_delegate=["aten::silu"]).placement
        assert {row.where for row in rows} == {"npu"}


class TestWhereAnOperatorComesFrom:
    """A plain Sequential has no source line of the user, but its modules have names."""

    @staticmethod
    def skipping() -> nn.Module:
        pool = nn.Sequential(nn.MaxPool2d(1, 4097))
        return seeded(lambda: nn.Sequential(nn.Conv2d(4, 4, 1), pool, nn.Conv2d(4, 4, 1)))

    @pytest.mark.parametrize("strict", [False, True])
    def test_rows_name_the_module(self, strict: bool) -> None:
        model = quantize(self.skipping(), (image(),), [image()], strict=strict)
        rows = lower(model).placement
        assert [row.module for row in rows] == ["0", "1.0", "2"]
        assert not strict or rows[0].source is None

    def test_warnings_name_the_module(self) -> None:
        module = "module '1.0' \\(torch.nn.modules.pooling.MaxPool2d\\)"
        with pytest.warns(UnquantizedWarning, match=rf"max_pool2d \(aten\.max_pool2d\.default, {module}\): "):
            model = quantize(self.skipping(), (image(),), [image()])
        partitioner = NeutronPartitioner(generate_neutron_compile_spec("imxrt700"))
        exported = torch.export.export(model.module, model.example_inputs)
        with pytest.warns(CpuWarning, match=r"max_pool2d \(aten\.max_pool2d_with_indices\.default, module '1\.0'\): "):
            partitioner.transform_for_pre_decomposition(exported)

    def test_the_users_line_comes_first(self) -> None:
        rows = lower(quantize(seeded(Written), (image(),), [image()])).placement
        assert all(re.search(r"test_options\.py:\d+$", row.source or "") for row in rows)
        assert [row.module for row in rows] == ["conv", "act", "act", "norm", "conv", "", "", "conv"]

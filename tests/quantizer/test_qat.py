"""Quantization-aware training: trained parameters, and conversion equal to that after calibration."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.flow_support import Inputs, lower_documented, seeded, worst_lsb
from tests.models import Model, bn, bn1, conv, image, trained
from tests.qat_support import BATCH, exported, operators, prepared, train
from torch import nn
from torch.fx import GraphModule
from torchao.quantization.pt2e import (
    FakeQuantize,
    FusedMovingAvgObsFakeQuantize,
    HistogramObserver,
    MovingAverageMinMaxObserver,
    disable_observer,
    move_exported_model_to_eval,
    move_exported_model_to_train,
)
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

from openneutron import NeutronQuantizer, lower, quantize
from openneutron.core.fx import is_dequantize, op_name
from openneutron.quantizer import RangeObserver, RecentRangeObserver, UnquantizedWarning
from openneutron.quantizer.trained_modules import BatchNorm, OnlyInTraining, WeightFakeQuantize

# Tolerance in int8 steps, because differences are computed in float.
ROUNDING = 1e-3
# The gradient of a bias before a batch norm is zero, except for rounding in float.
NO_GRADIENT = 1e-6


def grouped() -> nn.Module:
    return nn.Conv2d(4, 8, 3, groups=2, padding="same", bias=False)


def upsampling() -> nn.Module:
    return nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)


def read_twice(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.c(x)
    result: torch.Tensor = F.relu(m.b(y)) + y
    return result


def residual(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.relu(m.b(m.d(F.relu(m.a(m.c(x))))) + x)


def shared_convolution(m: Any, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = m.b(m.c(F.relu(m.a(m.c(x)))))
    return result


def gate(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = F.relu(m.a(m.c(x)))
    result: torch.Tensor = y * torch.sigmoid(m.b(m.d(y.mean((2, 3), keepdim=True))))
    return result


def concatenation(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(torch.cat([m.a(m.c(x)), torch.tanh(m.b(m.d(x)))], 1), 2)


def classifier(m: Any, x: torch.Tensor) -> torch.Tensor:
    x = F.max_pool2d(m.e(F.relu(m.a(m.c(x)))), 2)
    return F.softmax(m.l(m.d(x.view(x.size(0), -1))), 1)


def products(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Multiplies with weights in the order [inputs, outputs], and with a bias of two dimensions."""
    y = torch.addmm(m.w.bias.reshape(1, -1), x, m.w.weight.T)
    return torch.mm(F.relu(y), m.v.weight.T)


def unbiased() -> nn.Module:
    return nn.Linear(6, 5, bias=False)


def normalized_weights() -> nn.Module:
    layer: nn.Module = nn.utils.parametrizations.weight_norm(conv(bias=False))
    return layer


def odd_norm() -> nn.Module:
    return trained(nn.BatchNorm2d(4, eps=0.5, momentum=0.3))


def with_affine(norm: nn.GroupNorm | nn.LayerNorm) -> nn.Module:
    """Sets weights and biases; weights of 1 and biases of 0 would be removed before calibration."""
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    return norm


def plain_norm() -> nn.Module:
    return nn.BatchNorm2d(4, affine=False)


@dataclass(frozen=True)
class Case:
    label: str
    build: Callable[[], nn.Module] = field(repr=False)
    shape: tuple[int, ...] = (4, 8, 8)
    options: tuple[tuple[str, Any], ...] = ()

    def model(self) -> nn.Module:
        return seeded(self.build).train()


PER_CHANNEL = (("weight_granularity", "per_channel"),)
CASES = (
    Case("convolution", conv),
    Case("conv bn", lambda: nn.Sequential(conv(), bn())),
    Case("conv bn without bias", lambda: nn.Sequential(conv(bias=False), bn())),
    Case("conv bn relu", lambda: nn.Sequential(conv(bias=False), bn(), nn.ReLU())),
    Case("conv bn relu6 in place", lambda: nn.Sequential(conv(bias=False), bn(), nn.ReLU6(inplace=True))),
    Case("depthwise bn", lambda: nn.Sequential(conv(groups=4), bn(), nn.ReLU())),
    Case("grouped bn", lambda: nn.Sequential(grouped(), bn(8))),
    Case("conv1d bn", lambda: nn.Sequential(nn.Conv1d(4, 6, 3, bias=False), bn1(6), nn.ReLU()), (4, 16)),
    Case("transposed bn", lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 2, 2, bias=False), bn(6), nn.ReLU())),
    Case("transposed in groups", lambda: nn.Sequential(upsampling(), bn(6)), options=PER_CHANNEL),
    Case("linear bn", lambda: nn.Sequential(nn.Linear(8, 6), bn1(6)), (8,)),
    Case("linear bn without bias", lambda: nn.Sequential(nn.Linear(8, 6, bias=False), bn1(6), nn.ReLU()), (8,)),
    Case("linear bn per channel", lambda: nn.Sequential(nn.Linear(8, 6), bn1(6)), (8,), PER_CHANNEL),
    Case("products per channel", lambda: Model(products, w=nn.Linear(8, 6), v=unbiased()), (8,), PER_CHANNEL),
    Case("bn over another dimension", lambda: nn.Sequential(nn.Linear(8, 6), bn1(4)), (4, 8)),
    Case("conv read twice", lambda: Model(read_twice, c=conv(), b=bn())),
    Case("residual", lambda: Model(residual, c=conv(), a=bn(), d=conv(bias=False), b=bn())),
    Case("conv used twice", lambda: Model(shared_convolution, c=conv(), a=bn(), b=bn())),
    Case("bn alone", bn),
    Case("bn of rank 2 alone", lambda: bn1(8), (8,)),
    Case("relu between", lambda: nn.Sequential(conv(), nn.ReLU(), bn(), nn.ReLU(), conv())),
    Case("bn without weights", lambda: nn.Sequential(conv(bias=False), plain_norm())),
    Case("eps and momentum", lambda: nn.Sequential(conv(bias=False), odd_norm())),
    Case("per channel", lambda: nn.Sequential(conv(bias=False), bn(), nn.ReLU(), conv()), options=PER_CHANNEL),
    Case("depthwise per channel", lambda: nn.Sequential(conv(groups=4), bn(), nn.ReLU(), bn()), options=PER_CHANNEL),
    Case("instance norm and silu", lambda: nn.Sequential(conv(), with_affine(nn.GroupNorm(4, 4)), nn.SiLU())),
    Case("layer norm", lambda: nn.Sequential(nn.Linear(8, 8), with_affine(nn.LayerNorm(8))), (4, 8)),
    Case("computed weights", lambda: nn.Sequential(normalized_weights(), bn())),
    Case("sigmoid gate", lambda: Model(gate, c=conv(), a=bn(), d=nn.Conv2d(4, 4, 1), b=bn())),
    Case("concatenation", lambda: Model(concatenation, c=conv(), a=bn(), d=conv(), b=bn())),
    Case(
        "dropouts",
        lambda: Model(classifier, c=conv(), a=bn(), e=nn.Dropout2d(0.2), d=nn.Dropout(), l=nn.Linear(64, 5)),
    ),
)  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.label.replace(" ", "_"))


@lru_cache(maxsize=2)
def trained_and_converted(case: Case) -> tuple[GraphModule, GraphModule]:
    """Returns the trained module and the converted module."""
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        module = train(prepared(case.model(), case.shape, **dict(case.options)), case.shape)
    return module, convert_pt2e(copy.deepcopy(module))


@every_case
def test_conversion_gives_the_same_operators_as_after_calibration(case: Case) -> None:
    _, converted = trained_and_converted(case)
    example = (image(1, *case.shape),)
    calibrated = quantize(case.model().eval(), example, [example], **dict(case.options))
    assert operators(converted) == operators(calibrated.module)
    assert not [node for node in converted.graph.nodes if node.op == "call_module" and node.target != "_guards_fn"]


@every_case
def test_the_program_is_one_delegate_and_follows_the_converted_module(case: Case) -> None:
    _, converted = trained_and_converted(case)
    samples: list[Inputs] = [(image(1, *case.shape, seed=seed),) for seed in range(3)]
    program = lower_documented(converted, samples[0])
    assert (program.delegates, program.cpu) == (1, [])
    assert worst_lsb(converted, program.run, samples) <= 1 + ROUNDING


@every_case
def test_models_that_train_in_float_train_quantized(case: Case) -> None:
    module, _ = trained_and_converted(case)
    floating = train(case.model(), case.shape)
    before, after = case.model().state_dict(), module.state_dict()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert gradients.keys() == dict(floating.named_parameters()).keys()
    for name, parameter in floating.named_parameters():
        if parameter.grad.abs().max() > NO_GRADIENT:
            gradient = gradients[name]
            assert gradient is not None, name
            assert gradient.abs().max() > NO_GRADIENT, name
            assert not torch.equal(before[name], after[name]), name
    for name, _ in floating.named_buffers():
        torch.testing.assert_close(after[name], floating.state_dict()[name], rtol=0.1, atol=0.1)
        assert not torch.equal(before[name], after[name]), name


def case_of(label: str) -> Case:
    (case,) = (case for case in CASES if case.label == label)
    return case


class TestModes:
    @pytest.mark.parametrize("label", ["residual", "eps and momentum", "dropouts", "depthwise per channel"])
    @torch.no_grad()
    def test_validation_in_training_equals_the_converted_module(self, label: str) -> None:
        case = case_of(label)
        module = copy.deepcopy(trained_and_converted(case)[0])
        move_exported_model_to_eval(module)
        module.apply(disable_observer)
        validated = module(image(BATCH, *case.shape))
        converted = convert_pt2e(module)
        assert worst_lsb(converted, lambda _: validated, [(image(BATCH, *case.shape),)]) <= 1 + ROUNDING
        assert (converted(image(BATCH, *case.shape)) == validated).float().mean() > 0.99

    @torch.no_grad()
    def test_conversion_asks_for_no_mode(self) -> None:
        module, converted = trained_and_converted(case_of("dropouts"))
        module = copy.deepcopy(module)
        move_exported_model_to_eval(module)
        assert torch.equal(convert_pt2e(module)(image(3, 4, 8, 8)), converted(image(3, 4, 8, 8)))

    @torch.no_grad()
    def test_to_eval_and_back(self) -> None:
        module = prepared(case_of("dropouts").model())
        x = image(BATCH, 4, 8, 8)
        assert not torch.equal(module(x), module(x))
        move_exported_model_to_eval(module)
        module.apply(disable_observer)
        mean = module.get_buffer("a.running_mean").clone()
        assert torch.equal(module(x), module(x))
        assert torch.equal(module.get_buffer("a.running_mean"), mean)
        move_exported_model_to_train(module)
        assert not torch.equal(module(x), module(x))
        assert not torch.equal(module.get_buffer("a.running_mean"), mean)

    def test_training_goes_on_with_fixed_statistics_in_eval_mode(self) -> None:
        case = case_of("residual")
        module = train(prepared(case.model()))
        move_exported_model_to_eval(module)
        before = {name: value.clone() for name, value in module.state_dict().items()}
        train(module)
        after = module.state_dict()
        assert torch.equal(after["a.running_var"], before["a.running_var"])
        assert not torch.equal(after["a.weight"], before["a.weight"])
        assert not torch.equal(after["c.weight"], before["c.weight"])

    def test_a_model_exported_in_eval_mode(self) -> None:
        case = case_of("residual")
        example = image(BATCH, 4, 8, 8)
        module = prepare_qat_pt2e(
            torch.export.export(case.model().eval(), (example,)).module(), NeutronQuantizer(is_qat=True)
        )
        parameters = dict(module.named_parameters())
        assert len(parameters) == 4
        before = {name: value.detach().clone() for name, value in parameters.items()}
        converted = convert_pt2e(train(module))
        assert not any(torch.equal(before[name], value) for name, value in parameters.items())
        assert operators(converted) == operators(quantize(case.model().eval(), (example,), [example]).module)

    def test_strict_export(self) -> None:
        case = case_of("dropouts")
        module = prepare_qat_pt2e(exported(case.model(), strict=True), NeutronQuantizer(is_qat=True))
        assert operators(convert_pt2e(train(module))) == operators(trained_and_converted(case)[1])

    def test_shapes_may_be_static(self) -> None:
        example = image(BATCH, 4, 8, 8)
        static = torch.export.export(case_of("dropouts").model(), (example,)).module()
        converted = convert_pt2e(train(prepare_qat_pt2e(static, NeutronQuantizer(is_qat=True))))
        program = lower_documented(converted, (example,))
        assert (program.delegates, program.cpu) == (1, [])
        assert worst_lsb(converted, program.run, [(example,)]) <= 1 + ROUNDING


class TestPreparedModule:
    def test_a_prepared_module_loads_the_state_of_another_one(self) -> None:
        case = case_of("depthwise per channel")
        module, converted = trained_and_converted(case)
        other = prepared(case.model(), **dict(case.options))
        other.load_state_dict(module.state_dict())
        assert torch.equal(convert_pt2e(other)(image(3, 4, 8, 8)), converted(image(3, 4, 8, 8)))

    def test_a_prepared_module_loads_the_state_of_a_float_model(self) -> None:
        case = case_of("residual")
        floating = train(case.model())
        module = prepared(case.model())
        missing, unexpected = module.load_state_dict(floating.state_dict(), strict=False)
        assert not unexpected
        assert all("activation_post_process" in name or "WeightFakeQuantize" in name for name in missing)
        assert torch.equal(module.get_parameter("c.weight"), floating.c.weight)

    def test_same_seed_same_numbers(self) -> None:
        case = case_of("dropouts")
        states = []
        for _ in range(2):
            torch.manual_seed(0)
            states.append(train(prepared(case.model())).state_dict())
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

    @torch.no_grad()
    def test_fake_quantized_weights_equal_the_converted_ones(self) -> None:
        model = seeded(lambda: nn.Sequential(conv(bias=False), bn()))
        module = prepared(model, weight_bits=4)
        (fake_quantizer,) = (child for child in module.modules() if isinstance(child, WeightFakeQuantize))
        norm: Any = model[1]  # type: ignore[index]
        scale = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).reshape(-1, 1, 1, 1)
        rounded = fake_quantizer(module.get_parameter("0.weight"), norm.weight, norm.running_var, norm.eps) * scale
        codes = rounded / fake_quantizer.scale
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
        assert (codes.min().round(), codes.max().round()) in ((-7, 7), (-7, 6), (-6, 7))
        folded = module.get_parameter("0.weight") * scale
        assert (rounded - folded).abs().max() <= fake_quantizer.scale * 0.501

    def test_a_scale_of_zero(self) -> None:
        model = seeded(lambda: nn.Sequential(conv(), bn())).train()
        model[1].weight.data[1] = 0  # type: ignore[index]
        module = train(prepared(model))
        assert all(torch.isfinite(value).all() for value in module.parameters())
        assert torch.isfinite(convert_pt2e(module)(image())).all()

    def test_fewer_bits_are_fewer_codes(self) -> None:
        converted = convert_pt2e(train(prepared(case_of("conv bn relu").model(), weight_bits=3)))
        (codes,) = (value for value in converted.buffers() if value.dtype == torch.int8)
        assert codes.abs().max() == 3

    def test_no_batch_norm_remains_for_torchao_to_fold(self) -> None:
        module = prepared(case_of("residual").model())
        assert "aten.batch_norm.default" not in operators(module)
        assert sum(isinstance(child, BatchNorm) for child in module.modules()) == 2

    def test_a_layer_that_is_left_in_float(self) -> None:
        case = case_of("residual")
        converted = convert_pt2e(train(prepared(case.model(), layers={"c": "float"})))
        (floating, quantized) = (node for node in converted.graph.nodes if op_name(node) == "aten.conv2d.default")
        assert not [operand for operand in floating.all_input_nodes[1:] if is_dequantize(operand)]
        assert all(map(is_dequantize, quantized.all_input_nodes))
        assert not [name for name in operators(converted) if "norm" in name]

    def test_batch_norms_of_float_operators_are_folded(self) -> None:
        wide: dict[str, Any] = {"kernel_size": (1, 2), "dilation": (1, 4097), "bias": False}
        model = seeded(lambda: nn.Sequential(nn.Conv2d(2, 3, **wide), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))).train()
        with pytest.warns(UnquantizedWarning, match="conv2d"):
            module = train(prepared(model, (2, 1, 4100)), (2, 1, 4100))
        move_exported_model_to_eval(module)
        x = image(2, 2, 1, 4100)
        trained = module(x)
        converted = convert_pt2e(module)
        assert operators(converted)["aten.conv2d.default"] == 2
        assert not [name for name in operators(converted) if "batch_norm" in name]
        assert (converted(x) - trained).abs().max() <= 0.02 * trained.abs().max()


class TestOnlyInTraining:
    @pytest.mark.parametrize("drop", [nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout])
    def test_every_dropout_is_removed_at_conversion(self, drop: type[nn.Module]) -> None:
        module = prepared(nn.Sequential(conv(), drop(0.5), conv()))
        assert sum(isinstance(child, OnlyInTraining) for child in module.modules()) == 1
        x = image(BATCH, 4, 8, 8)
        assert not torch.equal(module(x), module(x))
        converted = convert_pt2e(module)
        assert operators(converted)["aten.conv2d.default"] == 2
        assert not [name for name in operators(converted) if "dropout" in name]
        assert torch.equal(converted(x), converted(x))

    def test_dropout_does_not_change_ranges(self) -> None:
        def function(m: Any, x: torch.Tensor) -> torch.Tensor:
            return m.l(F.relu(m.d(F.max_pool2d(m.c(x), 2))).flatten(1))  # type: ignore[no-any-return]

        def scales(drop: float) -> list[float]:
            model = seeded(lambda: Model(function, c=conv(), d=nn.Dropout(drop), l=nn.Linear(64, 3)))
            module = prepared(model)
            module(image(BATCH, 4, 8, 8))
            activations: list[Any] = [child for child in module.modules() if type(child) is FakeQuantize]
            return [float(child.scale) for child in activations[:-1]]  # the last one follows the linear

        assert scales(0.9) == scales(0.0)

    def test_a_detach_stops_gradients_until_conversion(self) -> None:
        module = prepared(seeded(lambda: Model(lambda m, x: m.d(m.c(x).detach()), c=conv(), d=conv())))
        module(image(BATCH, 4, 8, 8)).sum().backward()
        assert module.get_parameter("c.weight").grad is None
        assert module.get_parameter("d.weight").grad is not None
        found = operators(convert_pt2e(module))
        assert found["aten.conv2d.default"] == 2
        assert "aten.detach.default" not in found


def large_and_small(m: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([F.avg_pool2d(m.c(x), 4), F.max_pool2d(100 * m.d(x), 4)], 1)


class TestRanges:
    def test_recent_range(self) -> None:
        observer = RecentRangeObserver(dtype=torch.int8, quant_min=-128, quant_max=127)
        observer(torch.tensor([-1.0, 1.0]))
        observer(torch.tensor([0.0, 3.0]))
        assert float(observer.min_val) == pytest.approx(-0.99)
        assert float(observer.max_val) == 3.0
        for _ in range(500):
            observer(torch.tensor([-0.5, 0.5]))
        assert float(observer.min_val) == pytest.approx(-0.5, abs=0.02)
        assert float(observer.max_val) == pytest.approx(0.5, abs=0.02)

    def test_values_that_share_qparams_are_not_clipped(self) -> None:
        model = seeded(lambda: Model(large_and_small, c=conv(), d=conv()))
        converted = convert_pt2e(train(prepared(model), steps=50))
        x = image(BATCH, 4, 8, 8)
        assert converted(x).abs().max() > 0.95 * model(x).abs().max()

    @pytest.mark.parametrize(
        "observer",
        [
            RangeObserver,
            MovingAverageMinMaxObserver,
            MovingAverageMinMaxObserver.with_args(averaging_constant=0.5),
            HistogramObserver,
            FakeQuantize.with_args(observer=MovingAverageMinMaxObserver),
            FusedMovingAvgObsFakeQuantize.with_args(observer=MovingAverageMinMaxObserver),
            FusedMovingAvgObsFakeQuantize,
        ],
    )
    def test_an_observer_of_the_users_choice(self, observer: Any) -> None:
        case = case_of("conv bn relu")
        converted = convert_pt2e(train(prepared(case.model(), observer=observer)))
        assert operators(converted) == operators(trained_and_converted(case)[1])
        assert {row.where for row in lower(converted, (image(),)).placement} == {"npu"}

    def test_disable_observer_fixes_all_ranges_except_weights(self) -> None:
        module = train(prepared(case_of("conv bn relu").model()))
        module.apply(disable_observer)
        fake_quantizers: list[Any] = [child for child in module.modules() if isinstance(child, FakeQuantize)]
        before = [child.scale.clone() for child in fake_quantizers]
        train(module)
        fixed = {type(child): torch.equal(child.scale, old) for child, old in zip(fake_quantizers, before, strict=True)}
        assert fixed == {FakeQuantize: True, WeightFakeQuantize: False}

    def test_fixed_qparams(self) -> None:
        converted = trained_and_converted(case_of("sigmoid gate"))[1]
        (sigmoid,) = (node for node in converted.graph.nodes if op_name(node) == "aten.sigmoid.default")
        (quantized,) = sigmoid.users
        assert quantized.args[1:3] == (1 / 256, -128)

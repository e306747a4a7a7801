"""The rules of the passes over arithmetic: where each fires, where it must not, and its effect on accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fidelity import signal_to_noise
from tests.flow_support import flat, seeded
from tests.models import Model, conv, image
from tests.oracle import quantized, samples_like
from tests.passes.test_passes import after, exported, names
from torch import nn
from torch.fx import GraphModule

from openneutron import passes
from openneutron.core.fx import op_name
from openneutron.targets import TARGETS

Function = Callable[..., Any]
CHANNELS = torch.tensor([0.5, 2.0, -4.0, 8.0])
PER_CHANNEL = CHANNELS.reshape(4, 1, 1)
TOKENS = (1, 9, 4)
ROOT = math.sqrt(2 / math.pi)


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randn(TOKENS, generator=torch.Generator().manual_seed(seed))


def fold_arithmetic(module: GraphModule) -> bool:
    passes.fold_constants(module)
    passes.decompose(module, TARGETS["imxrt700"])  # divisions by constants and reversed differences
    passes.scalars_to_constants(module)
    return passes.fold_arithmetic(module)


def fuse_patterns(module: GraphModule) -> bool:
    passes.fold_constants(module)
    passes.eliminate_common_subexpressions(module)
    return passes.fuse_patterns(module, TARGETS["imxrt700"])


class TestFoldArithmetic:
    @pytest.mark.parametrize(
        "function",
        [
            lambda m, x: m.c(x) + 1.5,
            lambda m, x: m.c(x) - m.k,
            lambda m, x: m.k + m.c(x),
            lambda m, x: m.k - m.c(x),
            lambda m, x: m.c(x) * 3,
            lambda m, x: m.c(x) / 255,
            lambda m, x: m.c(x) * m.k,
            lambda m, x: (m.c(x) * m.k + 1) / 6 - m.k,
            lambda m, x: torch.rsub(m.c(x), 2, alpha=1),
            lambda m, x: m.b(x) + m.k,
            lambda m, x: m.b(x) * m.k,
            lambda m, x: m.s(x) + m.k.reshape(1, 4, 1, 1),
            lambda m, x: m.c(x[0]) * m.k,
        ],
        ids=[
            "number", "channels", "left", "from", "product", "quotient", "product by channels", "chain", "rsub",
            "no bias", "no bias, product", "same padding", "no batch",
        ],
    )  # fmt: skip
    def test_rule_1_convolutions(self, function: Function) -> None:
        model = Model(function, c=conv(), b=conv(bias=False), s=nn.Conv2d(4, 4, 3, padding="same"), k=PER_CHANNEL)
        folded = names(after(fold_arithmetic, seeded(lambda: model)))
        assert folded[-1].startswith("conv2d")
        assert set(folded[:-1]) <= {"select.int"}

    @pytest.mark.parametrize(
        "function",
        [
            lambda m, x: m.l(x) * 2 + m.k,
            lambda m, x: m.n(x) + m.k,
            lambda m, x: torch.mm(x[0], m.w) - 3,
            lambda m, x: torch.addmm(m.k, x[0], m.w) + m.k,
            lambda m, x: torch.addmm(m.k[None], x[0], m.w) * 0.5,
        ],
        ids=["linear", "no bias", "mm", "addmm", "addmm product"],
    )
    def test_rule_1_matrix_products(self, function: Function) -> None:
        model = Model(function, l=nn.Linear(4, 4), n=nn.Linear(4, 4, bias=False), w=torch.randn(4, 4), k=CHANNELS)
        folded = names(after(fold_arithmetic, seeded(lambda: model), tokens()))
        assert folded[-1] == "linear.default"
        assert set(folded[:-1]) <= {"select.int"}

    @pytest.mark.parametrize("groups", [1, 2])
    def test_rule_1_transposed_convolutions(self, groups: int) -> None:
        layer = nn.ConvTranspose2d(4, 4, 3, 2, groups=groups)
        model = Model(lambda m, x: (m.t(x) * 2 + m.k) * m.k - 1, t=layer, k=PER_CHANNEL)
        assert names(after(fold_arithmetic, seeded(lambda: model))) == ["conv_transpose2d.input"]

    def test_rule_1_shared_weights_do_not_change(self) -> None:
        model = Model(lambda m, x: (m.c(x) * 2, m.c(x.abs())), c=conv())
        assert names(after(fold_arithmetic, model)) == ["conv2d.default", "abs.default", "conv2d.default"]

    @pytest.mark.parametrize(
        ("function", "becomes"),
        [
            (lambda m, x: x * 2 * m.k / 3, ["mul.Tensor"]),
            (lambda m, x: (x + 1) - m.k, ["add.Tensor"]),
            (lambda m, x: 1 - (m.k + x), ["sub.Tensor"]),
            (lambda _, x: 2 - (1 - x), ["add.Tensor"]),
            (lambda m, x: m.k - x + 1.5, ["sub.Tensor"]),
            (lambda _, x: (x * 2 + 1) * 3 + 4, ["mul.Tensor", "add.Tensor", "mul.Tensor", "add.Tensor"]),
        ],
        ids=["products", "sums", "reversed last", "reversed twice", "reversed first", "alternating"],
    )
    def test_rule_2(self, function: Function, becomes: list[str]) -> None:
        assert names(after(fold_arithmetic, Model(function, k=PER_CHANNEL), changes=len(becomes) == 1)) == becomes

    @pytest.mark.parametrize(
        "function",
        [lambda _, x: x * 1, lambda _, x: x + 0, lambda _, x: x / 1.0, lambda _, x: (x + 1) - 1, lambda m, x: x - m.z],
        ids=["product", "sum", "quotient", "there and back", "zeros"],
    )
    def test_rule_3(self, function: Function) -> None:
        assert names(after(fold_arithmetic, Model(function, z=torch.zeros(4, 1, 1)))) == []

    @pytest.mark.parametrize(
        "function",
        [
            lambda m, x: (y := m.c(x), y + 1),
            lambda m, x: m.c(x) + m.image,
            lambda m, x: m.c(x) * m.columns,
            lambda m, x: m.c(x) + x,
            lambda m, x: m.c(x).relu() * 2,
            lambda m, x: m.c(x) + m.batch,
            lambda m, x: x[:, :1] * m.k,
            lambda _, x: F.conv2d(x, x[:, :, :3, :3]) * 2,
            lambda m, x: x * m.columns * m.k,
        ],
        ids=[
            "read twice", "image", "columns", "computed", "activation between", "another batch", "broadcast",
            "computed weight", "constants broadcast each other",
        ],
    )  # fmt: skip
    def test_must_not_fire(self, function: Function) -> None:
        parts = {"image": torch.randn(4, 8, 8), "columns": torch.randn(8), "batch": torch.randn(3, 4, 1, 1)}
        module = exported(seeded(lambda: Model(function, c=conv(), k=PER_CHANNEL, **parts)))
        passes.scalars_to_constants(module)
        before = names(module)
        assert not passes.fold_arithmetic(module)
        assert names(module) == before

    @settings(max_examples=25, deadline=None)
    @given(st.data())
    def test_any_chain_keeps_its_function(self, data: st.DataObject) -> None:
        """Convolutions and arithmetic in any order, on any values."""
        kinds = st.sampled_from(["conv", "add", "mul", "sub", "rsub", "div", "channels", "relu"])
        steps = data.draw(st.lists(st.tuples(kinds, st.integers(0, 2)), min_size=1, max_size=8))

        def function(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            values = [x]
            for kind, back in steps:
                value = values[-1 - back % len(values)]
                values.append({
                    "conv": m.c, "add": lambda v: v + 0.5, "mul": lambda v: v * -1.5, "sub": lambda v: m.k - v,
                    "rsub": lambda v: 1 - v, "div": lambda v: v / 3, "channels": lambda v: v * m.k, "relu": torch.relu,
                }[kind](value))  # fmt: skip
            return tuple(values[-2:])

        model = seeded(lambda: Model(function, c=conv(), k=PER_CHANNEL))
        module = exported(model)
        fold_arithmetic(module)
        for got, want in zip(flat(module(image())), flat(model(image())), strict=True):
            assert (got - want).abs().max() <= 1e-4 * want.abs().max().clamp(min=1)


def hand_written_norm(m: Any, x: torch.Tensor) -> torch.Tensor:
    """A hand-written norm over the channels of an image, as in ConvNeXt."""
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).pow(2).mean(1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-6)


class TestRecognize:
    @pytest.mark.parametrize(
        "function",
        [
            lambda _, x: F.relu6(x + 3) / 6,
            lambda _, x: torch.clamp(x + 3.0, 0, 6) * (1 / 6),
            lambda _, x: F.hardtanh(3 + x, 0.0, 6.0).mul(0.16667),
            lambda _, x: (x / 6 + 0.5).clamp(0, 1),
            lambda _, x: F.hardtanh(0.5 + x * (1 / 6), 0.0, 1.0),
        ],
    )
    def test_rule_1(self, function: Function) -> None:
        assert names(after(fuse_patterns, Model(function))) == ["hardsigmoid.default"]

    @pytest.mark.parametrize(
        "function",
        [
            lambda _, x: x * F.relu6(x + 3) / 6,
            lambda _, x: x * (F.relu6(x + 3) / 6),
            lambda _, x: F.hardtanh(x + 3, 0.0, 6.0) * 0.166666 * x,
            lambda _, x: x / 6 * torch.clamp(x + 3, 0, 6),
            lambda _, x: F.hardsigmoid(x) * x,
        ],
    )
    def test_rule_2(self, function: Function) -> None:
        assert names(after(fuse_patterns, Model(function))) == ["hardswish.default"]

    @pytest.mark.parametrize(
        ("function", "approximate"),
        [
            (lambda _, x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2))), "none"),
            (lambda _, x: 0.5 * x * (torch.erf(x * 0.70710678) + 1), "none"),
            (lambda _, x: x * (torch.erf(x / 1.41421356) + 1) / 2, "none"),
            (lambda _, x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 3)))), "tanh"),
            (lambda _, x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x * x * x))), "tanh"),
        ],
    )
    def test_rule_3(self, function: Function, approximate: str) -> None:
        module = after(fuse_patterns, Model(function))
        assert names(module) == ["gelu.default"]
        (gelu,) = (node for node in module.graph.nodes if op_name(node) == "aten.gelu.default")
        assert gelu.kwargs["approximate"] == approximate

    @pytest.mark.parametrize(
        ("function", "becomes"),
        [
            (lambda m, x: m.k / torch.sqrt(x), ["rsqrt.default", "mul.Tensor"]),
            (lambda _, x: x / (x + 1) ** 0.5, ["add.Tensor", "rsqrt.default", "mul.Tensor"]),
            (lambda _, x: torch.sqrt(x).reciprocal(), ["rsqrt.default"]),
        ],
    )
    def test_rule_4(self, function: Function, becomes: list[str]) -> None:
        assert names(after(fuse_patterns, Model(function, k=PER_CHANNEL), image().abs() + 0.1)) == becomes

    @pytest.mark.parametrize(
        "function",
        [
            hand_written_norm,
            lambda _, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
            lambda _, x: torch.rsqrt((x * x).mean((1, 2), keepdim=True) + 1e-6) * x,
            lambda _, x: x / torch.sqrt(torch.square(x).mean(1, keepdim=True) + 1e-6),
        ],
    )
    def test_rule_5(self, function: Function) -> None:
        module = exported(Model(function))
        assert fuse_patterns(module)
        found = names(module)
        assert found[-4:] == ["mean.dim", "add.Tensor", "rsqrt.default", "mul.Tensor"]
        assert found.count("rsqrt.default") == 2
        assert "abs.default" in found
        torch.testing.assert_close(module(image()), function(None, image()), rtol=2e-3, atol=2e-3)

    @pytest.mark.parametrize(
        ("function", "becomes"),
        [
            (lambda _, x: x.clamp(0), "relu.default"),
            (lambda _, x: x.clamp_min(0.0), "relu.default"),
            (lambda _, x: F.hardtanh(x, 0.0, math.inf), "relu.default"),
            (lambda _, x: x.clamp(0, 6), "relu6.default"),
            (lambda _, x: F.hardtanh(x, 0.0, 6.0), "relu6.default"),
        ],
    )
    def test_rule_6(self, function: Function, becomes: str) -> None:
        assert names(after(fuse_patterns, Model(function))) == [becomes]

    @pytest.mark.parametrize(
        "function",
        [
            lambda _, x: F.relu6(x + 3) / 5,
            lambda _, x: F.relu6(x + 2) / 6,
            lambda _, x: F.relu6(torch.add(x, 3, alpha=2)) / 6,
            lambda _, x: F.hardtanh(x + 3, 0.0, 5.0) / 6,
            lambda _, x: x.abs() * F.relu6(x + 3) / 6,
            lambda _, x: (y := F.relu6(x + 3), y / 6),
            lambda _, x: (x / 5 + 0.5).clamp(0, 1),
            lambda _, x: x * 0.5 * (1 + torch.erf(x / 1.5)),
            lambda _, x: x * 0.5 * (1 + torch.erf(x.abs() / math.sqrt(2))),
            lambda _, x: x.abs() / torch.sqrt(x.abs() + 1).exp(),
            lambda _, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)),
            lambda _, x: x * torch.rsqrt(x.pow(2).mean(-1) + 1e-6).mean(),
            lambda _, x: x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-6),
            lambda _, x: x * torch.rsqrt(x.abs().pow(2).mean(-1, keepdim=True) + 1e-6),
        ],
        ids=[
            "another divisor", "another shift", "alpha", "another limit", "another value", "read twice",
            "another slope", "another erf", "erf of another", "exp of a root", "no eps", "not kept", "another power",
            "norm of another",
        ],
    )  # fmt: skip
    def test_must_not_fire(self, function: Function) -> None:
        module = exported(Model(function))
        passes.eliminate_common_subexpressions(module)
        before = names(module)
        assert not passes.fuse_patterns(module, TARGETS["imxrt700"])
        assert names(module) == before


class TestFoldNormAffine:
    def model(self, function: Function) -> nn.Module:
        def build() -> nn.Module:
            norms = {"n": with_weights(nn.LayerNorm(4)), "r": with_weights(nn.RMSNorm(4))}
            linears = {"l": nn.Linear(4, 5), "o": nn.Linear(4, 3, bias=False)}
            return Model(function, **norms, **linears, c=nn.Conv1d(9, 4, 1))

        return seeded(build)

    @pytest.mark.parametrize(
        "function",
        [
            lambda m, x: m.l(m.n(x)),
            lambda m, x: (m.l(y := m.n(x)), m.o(y)),
            lambda m, x: m.o(m.r(x)),
            lambda m, x: m.l(m.n(x).transpose(0, 1)).transpose(0, 1),
            lambda m, x: m.l(m.n(x).reshape(3, 3, 4)),
            lambda m, x: m.l(m.n(x).permute(1, 0, 2).flatten(0, 1)),
        ],
        ids=["one", "two", "rms", "after a transpose", "after a reshape", "after several"],
    )
    def test_norms_before_linears_are_folded(self, function: Function) -> None:
        module = after(passes.fold_norm_affine, self.model(function), tokens())
        (norm,) = (node for node in module.graph.nodes if "_norm" in op_name(node))
        assert norm.args[2] is None
        assert passes.fold_norm_affine(module) is False

    @pytest.mark.parametrize(
        "function",
        [
            lambda m, x: m.n(x),
            lambda m, x: m.l(y := m.n(x)).sum() + y,
            lambda m, x: m.l(m.n(x).relu()),
            lambda m, x: m.c(m.n(x)),
            lambda m, x: m.l(m.n(x.transpose(1, 2).reshape(1, 9, 4)).reshape(1, 4, 9).transpose(1, 2)),
            lambda m, x: F.linear(m.o.weight, m.n(x)[0]),
            lambda m, x: m.l(F.layer_norm(x, (9, 4), x[0], x[0])),
        ],
        ids=["no reader", "another reader", "an operator between", "a convolution", "features moved", "as weight",
             "computed weights"],
    )  # fmt: skip
    def test_must_not_fire(self, function: Function) -> None:
        after(passes.fold_norm_affine, self.model(function), tokens(), changes=False)

    @pytest.mark.parametrize("spread", [0.0, 0.3, 0.7, 1.2])
    @pytest.mark.parametrize("trained_together", [False, True])
    def test_folding_a_norm_loses_no_sqnr_of_per_tensor_weights(self, spread: float, trained_together: bool) -> None:
        """Holds whether or not the following weights compensate for the norm's weights, as they do after training."""
        generator = torch.Generator().manual_seed(0)
        gains = torch.exp(spread * torch.randn(64, generator=generator))
        weight = torch.rand(64, 64, generator=generator) - 0.5
        weight = weight / gains if trained_together else weight
        parts = {"g": gains, "b": gains * 0.2, "w": weight}
        separate = Model(lambda m, x: F.linear(F.layer_norm(x, (64,)).mul(m.g).add(m.b), m.w), **parts)
        folded = Model(lambda m, x: F.linear(F.layer_norm(x, (64,), m.g, m.b), m.w), **parts)
        shapes = ((1, 50, 64),)
        apart, together = (
            signal_to_noise(quantized(model, shapes).module, model, samples_like(shapes, 4, 1, (0.0, 1.0)))
            for model in (separate, folded)
        )
        assert together >= apart - 0.5, (apart, together)


def with_weights(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    return norm


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.LayerNorm(8), lambda: nn.RMSNorm(8), lambda: nn.GroupNorm(2, 4), lambda: nn.InstanceNorm2d(4),
        lambda: Model(hand_written_norm), lambda: nn.Sequential(conv(), nn.Hardsigmoid(), conv(), nn.GELU()),
        lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Mish(), nn.LogSoftmax(-1)),
        lambda: Model(lambda _, x: x * F.relu6(x + 3) / 6 + (x.abs() + 1) ** 0.3 - x / (x.relu() + 1).sqrt()),
    ],
)  # fmt: skip
def test_a_second_preparation_changes_nothing(build: Callable[[], nn.Module]) -> None:
    """prepare() runs again before annotation, and must not change its own output."""
    module = exported(seeded(build))
    code = passes.prepare(module, TARGETS["imxrt700"]).code
    assert passes.prepare(module, TARGETS["imxrt700"]).code == code

"""Table of the operator tests: activations, clamps, powers, quotients, masks, softmax and norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tests.arithmetic_cases import IMAGE, one
from tests.case import Case, Rejected, Shape, of
from tests.oracle import Function
from torch import nn

__all__ = ["CASES", "REJECTED"]

aten = torch.ops.aten

MASK = torch.arange(8) % 3 > 0
CHANNELS = torch.linspace(-1, 2, 4).reshape(4, 1, 1)
# Activations that are fused into the operator before them.
FUSABLE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "clamp 0..6": lambda x: x.clamp(0, 6),
    "clamp 0..": lambda x: x.clamp(min=0),
    "clamp_min 0": lambda x: x.clamp_min(0),
    "hardtanh -1..1": F.hardtanh,
}


class _Activation(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return FUSABLE[self.name](values)


def _fused() -> list[Case]:
    def after(operator: Callable[..., torch.Tensor], name: str) -> Callable[[], nn.Module]:
        return of(lambda x, y: FUSABLE[name](operator(x, y)))

    def case(target: str, operator: Callable[..., torch.Tensor]) -> list[Case]:
        return [Case(target, f"then fused {a}", after(operator, a), (IMAGE, IMAGE), (0.0, 4.0)) for a in FUSABLE]

    def layer(target: str, make: Callable[[], nn.Module], shape: Shape, name: str) -> Case:
        model: Callable[[], nn.Module] = lambda: nn.Sequential(make(), _Activation(name))  # noqa: E731
        return Case(target, f"then fused {name}", model, (shape,), (0.0, 4.0))

    clamps = [name for name in FUSABLE if "clamp" in name]
    return [
        *case("aten.mul.Tensor", lambda x, y: x * y),
        *case("aten.sub.Tensor", lambda x, y: x - y),
        *case("aten.add.Tensor", lambda x, y: x + y)[2:5],
        *(layer("aten.conv2d.default", lambda: nn.Conv2d(3, 5, 3), (1, 3, 7, 7), name) for name in clamps),
        *(layer("aten.linear.default", lambda: nn.Linear(12, 7), (3, 12), name) for name in clamps),
    ]


def _clamps() -> list[Case]:
    def case(name: str, *limits: Any, spread: float = 3.0, shape: Shape = IMAGE, by: str = "default") -> Case:
        label = f"{', '.join(map(str, limits))} rank {len(shape)} 0+-{spread}"
        return Case(f"aten.{name}.{by}", label, of(lambda x: getattr(torch, name)(x, *limits)), (shape,), (0.0, spread))

    def in_place(name: str, *limits: float) -> Case:
        return Case(f"aten.{name}_.default", "in place", of(lambda x: getattr(-x, f"{name}_")(*limits)), (IMAGE,))

    def by_tensors(name: str, label: str, *limits: torch.Tensor) -> Case:
        function = of(lambda *values: getattr(torch, name)(values[-1], *values[:-1]), *limits)
        return Case(f"aten.{name}.Tensor", label, function, (IMAGE,))

    relus, others = ((0, 6), (-1, 1), (0, 1), (0, None)), ((-2, 3), (None, 1), (1, 2), (-4, -1))
    unit, zero = torch.tensor(1.0), torch.tensor(0.0)
    return [
        *(case("clamp", *limits) for limits in (*relus, *others)),
        case("clamp", -100, 100),
        case("clamp", -0.5, 0.5, spread=0.1),
        case("clamp", 0, 6, shape=(7,)),
        case("clamp", -2, 3, shape=(2, 3, 2, 5, 3)),
        case("clamp_min", 0),
        case("clamp_min", -0.75),
        case("clamp_max", 0.5),
        in_place("clamp", -0.5, 0.75),
        in_place("clamp_min", 0.0),
        in_place("clamp_max", 1.0),
        by_tensors("clamp", "one value", zero, unit),
        by_tensors("clamp", "channels", CHANNELS - 1, CHANNELS),
        by_tensors("clamp_min", "one value", zero),
        by_tensors("clamp_min", "channels", CHANNELS),
        by_tensors("clamp_max", "one value", unit),
        Case("aten.clip.Tensor", "computed", of(lambda x, y: torch.clip(x, y, y + 1)), (IMAGE, IMAGE)),
        Case("aten.clamp.Tensor", "computed", of(lambda x, y: torch.clamp(x, y, y + 1)), (IMAGE, IMAGE)),
        Case("aten.clamp_max.Tensor", "computed", of(lambda x, y: x.clamp_max(y)), (IMAGE, IMAGE)),
    ]  # fmt: skip


def _prelu() -> list[Case]:
    def case(label: str, slopes: torch.Tensor, shape: Shape, deviation: float = 1.0) -> Case:
        return Case("aten.prelu.default", label, of(lambda w, x: F.prelu(x, w), slopes), (shape,), (0.0, deviation))

    four = torch.tensor([0.25, -0.5, 0.0, 1.5])
    return [
        case("one slope", torch.tensor([0.25]), IMAGE),
        case("slope per channel", four, IMAGE),
        case("large", four, IMAGE, 30.0),
        case("rank 1", torch.tensor([0.1]), (9,)),
        case("rank 2", four, (3, 4)),
        case("rank 3", four, (2, 4, 9)),
        case("rank 5", four, (2, 4, 3, 2, 3)),
        Case("aten.prelu.default", "between convolutions",
             lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.PReLU(6), nn.Conv2d(6, 3, 1)), (IMAGE,)),
    ]  # fmt: skip


def _softmax() -> list[Case]:
    def case(label: str, shape: Shape, dim: int, **options: Any) -> Case:
        return Case("aten.softmax.int", label, of(lambda x: F.softmax(x, dim, **options)), (shape,), (0.0, 2.0))

    return [
        case("rank 2 first", (10, 3), 0),
        case("rank 3 middle", (2, 10, 3), 1),
        case("rank 3 first", (10, 2, 3), 0),
        case("rank 4 batch", (6, 3, 4, 5), 0),
        case("rank 4 height", (2, 3, 6, 5), 2),
        case("rank 5 middle", (2, 3, 6, 2, 3), -3),
        case("dtype", (2, 3, 10), -1, dtype=torch.float32),
        Case("aten.softmax.int", "between convolutions",
             lambda: Function(lambda a, b, x: b(a(x).softmax(2)), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 3, 1)), (IMAGE,)),
    ]  # fmt: skip


def _sums() -> list[Case]:
    def case(target: str, label: str, function: Callable[..., Any]) -> Case:
        return Case(target, label, of(function), (IMAGE, IMAGE))

    def number(target: str, label: str, function: Callable[..., Any]) -> Case:
        return Case(target, label, of(function), (IMAGE,))

    constant = torch.tensor([3, -2, 1, 5]).reshape(4, 1, 1)
    return [
        case("aten.add.Tensor", "alpha", lambda x, y: torch.add(x, y, alpha=2.5)),
        case("aten.add.Tensor", "negative alpha, relu", lambda x, y: torch.add(x, y, alpha=-0.3).relu()),
        case("aten.sub.Tensor", "alpha", lambda x, y: torch.sub(x, y, alpha=3)),
        case("aten.sub.Tensor", "negative alpha", lambda x, y: torch.sub(x, y, alpha=-1)),
        case("aten.rsub.Tensor", "", torch.rsub),
        case("aten.rsub.Tensor", "alpha", lambda x, y: torch.rsub(x, y, alpha=0.25)),
        number("aten.rsub.Scalar", "", lambda x: 1 - x),
        number("aten.rsub.Scalar", "alpha", lambda x: torch.rsub(x, 2.0, alpha=3)),
        Case("aten.add.Tensor", "constant with alpha", of(lambda c, x: torch.add(x, c, alpha=2), CHANNELS), (IMAGE,)),
        Case("aten.mul.Tensor", "integer constant", of(lambda c, x: x * c, constant), (IMAGE,)),
        Case("aten.mul.Tensor", "mask", of(lambda c, x: x * c, MASK), (IMAGE,)),
        Case("aten.sub.Tensor", "from a constant", of(lambda c, x: c - x, constant), (IMAGE,)),
        case("aten.max.other", "", torch.max),
        case("aten.min.other", "", torch.min),
        number("aten.max.other", "constant", lambda x: torch.max(x, torch.tensor(0.25))),
    ]


def _activations() -> list[Case]:
    return [
        *one("aten.gelu.default", F.gelu),
        Case("aten.gelu.default", "tanh", of(lambda x: F.gelu(x, approximate="tanh")), (IMAGE,)),
        *one("aten.hardsigmoid.default", F.hardsigmoid),
        Case("aten.hardsigmoid.default", "after a convolution",
             lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.Hardsigmoid()), (IMAGE,)),
        *one("aten.elu.default", F.elu),
        Case("aten.elu.default", "alpha", of(lambda x: F.elu(x, 0.5)), (IMAGE,), (0.0, 3.0)),
        Case("aten.elu.default", "alpha 0", of(lambda x: F.elu(x, 0.0)), (IMAGE,)),
        *one("aten.rrelu.default", F.rrelu),
        *one("aten.celu.default", F.celu, "", "large"),
        Case("aten.celu.default", "alpha", of(lambda x: F.celu(x, 2.0)), (IMAGE,), (0.0, 3.0)),
        *one("aten.selu.default", F.selu),
        *one("aten.softplus.default", F.softplus),
        Case("aten.softplus.default", "beta", of(lambda x: F.softplus(x, 2.0)), (IMAGE,), (0.0, 3.0)),
        *one("aten.mish.default", F.mish),
        *one("aten.log_sigmoid.default", F.logsigmoid),
        *one("aten.softshrink.default", F.softshrink),
        *one("aten.log_softmax.int", lambda x: F.log_softmax(x, -1)),
        Case("aten.log_softmax.int", "channels", of(lambda x: F.log_softmax(x, 1)), (IMAGE,)),
        Case("aten._log_softmax.default", "wide", of(lambda x: aten._log_softmax(x, 1, False)), ((3, 1000),)),
        Case("aten.threshold.default", "0", of(lambda x: F.threshold(x, 0, 0)), (IMAGE,)),
        Case("aten.threshold.default", "0.5", of(lambda x: F.threshold(x, 0.5, 0.5)), (IMAGE,)),
        Case("aten.glu.default", "channels", of(lambda x: F.glu(x, 1)), (IMAGE,)),
        Case("aten.glu.default", "last", of(F.glu), ((3, 10),)),
    ]  # fmt: skip


def _functions() -> list[Case]:
    def positive(target: str, label: str, function: Callable[..., Any], least: float = 0.5) -> Case:
        return Case(target, label, of(lambda x: function(x.abs() + least)), (IMAGE,))

    def power(label: str, exponent: float) -> Case:
        return Case("aten.pow.Tensor_Scalar", label, of(lambda x: x**exponent), (IMAGE,))

    def by_mode(name: str, divisor: float | torch.Tensor) -> Case:
        return Case(f"aten.div.{name}_mode", "", of(lambda x: getattr(aten.div, f"{name}_mode")(
            x, divisor, rounding_mode=None)), (IMAGE,))  # fmt: skip

    tensor_power = aten.pow.Tensor_Tensor
    return [
        positive("aten.sqrt.default", "", torch.sqrt),
        Case("aten.sqrt.default", "of zeros", of(lambda x: torch.sqrt(x.relu())), (IMAGE,)),
        Case("aten.sqrt.default", "of small values", of(lambda x: torch.sqrt(x * x * 1e-4)), (IMAGE,)),
        Case("aten.pow.Tensor_Scalar", "1", of(lambda x: x.abs() ** 1), (IMAGE,)),
        *(power(str(exponent), exponent) for exponent in (2, 3, 4, 7)),
        positive("aten.pow.Tensor_Scalar", "-0.5", lambda x: x**-0.5),
        positive("aten.pow.Tensor_Scalar", "-1", lambda x: x**-1),
        positive("aten.pow.Tensor_Scalar", "-2", lambda x: x**-2),
        positive("aten.pow.Tensor_Scalar", "0.5", lambda x: x**0.5),
        positive("aten.pow.Tensor_Scalar", "2.5", lambda x: x**2.5),
        Case("aten.pow.Tensor_Scalar", "0.25 of zeros", of(lambda x: x.relu() ** 0.25), (IMAGE,)),
        Case("aten.pow.Tensor_Tensor", "one value", of(lambda c, x: tensor_power(x, c), torch.tensor(2.0)), (IMAGE,)),
        Case("aten.pow.Tensor_Tensor", "equal values", of(lambda c, x: x**c, torch.full((4, 1, 1), 3.0)), (IMAGE,)),
        Case("aten.pow.Scalar", "2", of(lambda x: 2**x), (IMAGE,)),
        Case("aten.pow.Scalar", "0.1", of(lambda x: 0.1**x), (IMAGE,)),
        *one("aten.square.default", torch.square),
        positive("aten.reciprocal.default", "", torch.reciprocal),
        positive("aten.reciprocal.default", "of a number", lambda x: 3.0 / x),
        Case("aten.div.Tensor", "by a number", of(lambda x: x / 3), (IMAGE,)),
        Case("aten.true_divide.Tensor", "by a number", of(lambda x: torch.true_divide(x, 3)), (IMAGE,)),
        Case("aten.divide.Tensor", "by a number", of(lambda x: torch.divide(x, 3)), (IMAGE,)),
        Case("aten.mul.Tensor", "division in place", of(lambda x: (x + 1).div_(-7)), (IMAGE,)),
        Case("aten.div.Tensor", "by channels", of(lambda c, x: x / c, CHANNELS + 3), (IMAGE,)),
        Case("aten.div.Tensor", "by an integer", of(lambda c, x: x / c, torch.tensor(4)), (IMAGE,)),
        Case("aten.div.Tensor", "softsign", of(F.softsign), (IMAGE,)),
        Case("aten.div.Tensor", "by a mean", of(lambda x: x / (x.abs().mean((2, 3), True) + 1e-6)), (IMAGE,)),
        Case("aten.div.Tensor", "normalize", of(lambda x: F.normalize(x, dim=1)), ((3, 10),)),
        Case("aten.div.Scalar", "", of(lambda x: aten.div.Scalar(x, 5)), (IMAGE,)),
        by_mode("Tensor", CHANNELS + 3),
        by_mode("Scalar", 3),
        *one("aten.exp2.default", torch.exp2, "", "tiny", "one-sided"),
        *one("aten.expm1.default", torch.expm1, "", "tiny", "one-sided"),
        *(positive(f"aten.{function.__name__}.default", "", function)
          for function in (torch.log1p, torch.log2, torch.log10)),
        Case("aten.logit.default", "of a sigmoid", of(lambda x: torch.logit(x.sigmoid(), 1e-3)), (IMAGE,)),
        Case("aten.logit.default", "of values beyond 0 and 1", of(lambda x: torch.logit(x, 0.05)), (IMAGE,)),
        Case("aten.logit.default", "least epsilon", of(lambda x: torch.logit(x.sigmoid(), 2.0**-24)), (IMAGE,)),
    ]  # fmt: skip


def _deviations() -> list[Case]:
    """Statistics that are square roots of sums."""

    def case(target: str, label: str, function: Callable[..., Any], shape: Shape = IMAGE) -> Case:
        return Case(f"aten.{target}", label, of(function), (shape,))

    vector_norm = "linalg_vector_norm.default"
    return [
        case("std.default", "everything", lambda x: aten.std.default(x, False)),
        case("std.dim", "rows", lambda x: aten.std.dim(x, [-1], False)),
        case("std.correction", "image", lambda x: x.std((2, 3), correction=0)),
        case("std_mean.default", "everything", lambda x: aten.std_mean.default(x, True)),
        case("std_mean.dim", "rows", lambda x: aten.std_mean.dim(x, [-1], True)),
        case("std_mean.correction", "image kept", lambda x: torch.std_mean(x, (2, 3), correction=0, keepdim=True)),
        case(vector_norm, "order 2 of channels", lambda x: torch.linalg.vector_norm(x, dim=1)),
        case(vector_norm, "order 2 of images kept", lambda x: x.norm(dim=(2, 3), keepdim=True)),
    ]


def _masks() -> list[Case]:
    def case(target: str, label: str, function: Callable[..., Any], *parts: torch.Tensor, inputs: int = 1) -> Case:
        return Case(f"aten.{target}", label, of(function, MASK, *parts), (IMAGE,) * inputs)

    return [
        case("where.self", "two values", torch.where, inputs=2),
        case("where.self", "constant", lambda m, c, x: torch.where(m, x, c), CHANNELS),
        case("where.self", "constant first", torch.where, CHANNELS),
        case("where.ScalarOther", "0", lambda m, x: torch.where(m, x, 0.0)),
        case("where.ScalarOther", "2", lambda m, x: torch.where(m, x, 2)),
        case("where.ScalarSelf", "-1", lambda m, x: torch.where(m, -1.0, x)),
        case("masked_fill.Scalar", "0", lambda m, x: x.masked_fill(m, 0)),
        case("masked_fill.Scalar", "-3", lambda m, x: x.masked_fill(m, -3.0)),
        case("masked_fill.Tensor", "", lambda m, c, x: x.masked_fill(m, c), torch.tensor(1.5)),
    ]


def by_own_statistics(x: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(x, x.mean((0, 2, 3)), x.square().mean((0, 2, 3)))


def scaled_by_the_input(mean: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(x, mean, mean.square() + 0.5, x.mean((0, 2, 3)), x[0, :, 0, 0])


def _norms() -> list[Case]:
    def case(target: str, label: str, make: Callable[[], nn.Module], shape: Shape, *spread: float) -> Case:
        mean, deviation = spread or (0.0, 1.0)
        return Case(f"aten.{target}", label, lambda: _with_affine(make()), (shape,), (mean, deviation))

    def between(make: Callable[[int], nn.Module]) -> Callable[[], nn.Module]:
        return lambda: nn.Sequential(nn.Conv2d(4, 12, 3), _with_affine(make(12)), nn.Conv2d(12, 4, 1))

    def last(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        function = lambda norm, x: norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # noqa: E731
        return lambda: Function(function, _with_affine(make()))

    tokens, image = (1, 50, 192), (1, 12, 8, 8)
    layer, running = "layer_norm.default", {"affine": True, "track_running_stats": True}
    deviation = of(lambda x: (x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + 1e-6))
    return [
        case(layer, "tokens", lambda: nn.LayerNorm(192), tokens),
        case(layer, "tokens wide", lambda: nn.LayerNorm(192), tokens, 0.0, 3.0),
        case(layer, "tokens one-sided", lambda: nn.LayerNorm(192), tokens, 4.0, 1.0),
        case(layer, "no bias", lambda: nn.LayerNorm(10, bias=False), (3, 10)),
        case(layer, "plain", lambda: nn.LayerNorm(10, elementwise_affine=False), (3, 10)),
        case(layer, "two dimensions", lambda: nn.LayerNorm((8, 8)), image),
        Case(f"aten.{layer}", "channels last", last(lambda: nn.LayerNorm(96)), ((1, 96, 8, 8),)),
        Case(f"aten.{layer}", "before a linear",
             lambda: nn.Sequential(_with_affine(nn.LayerNorm(16)), nn.Linear(16, 8)), ((1, 5, 16),)),
        case("rms_norm.default", "tokens", lambda: nn.RMSNorm(192), tokens),
        case("rms_norm.default", "eps", lambda: nn.RMSNorm(10, 1e-3, elementwise_affine=False), (3, 10)),
        case("group_norm.default", "groups", lambda: nn.GroupNorm(3, 12), image),
        case("group_norm.default", "batch", lambda: nn.GroupNorm(3, 12), (2, 12, 7, 5)),
        case("group_norm.default", "one group", lambda: nn.GroupNorm(1, 12), image),
        case("group_norm.default", "a group per channel", lambda: nn.GroupNorm(12, 12), image),
        case("group_norm.default", "rank 2", lambda: nn.GroupNorm(3, 12), (4, 12)),
        case("group_norm.default", "rank 3", lambda: nn.GroupNorm(3, 12, affine=False), (2, 12, 9)),
        Case("aten.group_norm.default", "between convolutions", between(lambda c: nn.GroupNorm(4, c)), (IMAGE,)),
        case("instance_norm.default", "images", lambda: nn.InstanceNorm2d(12, affine=True), image),
        case("instance_norm.default", "lines", lambda: nn.InstanceNorm1d(12), (2, 12, 30)),
        case("instance_norm.default", "running", lambda: nn.InstanceNorm2d(12, **running), image),
        Case("aten.instance_norm.default", "running, between convolutions",
             between(lambda c: nn.InstanceNorm2d(c, **running)), (IMAGE,)),
        Case("aten.div.Tensor", "by a standard deviation", deviation, (IMAGE,)),
        Case("aten.batch_norm.default", "of the input", of(by_own_statistics), (IMAGE,)),
        Case("aten.batch_norm.default", "scaled by the input", of(scaled_by_the_input, CHANNELS.flatten()), (IMAGE,)),
    ]  # fmt: skip


def _with_affine(norm: nn.Module) -> nn.Module:
    """Returns a norm with weights and statistics as after a training."""
    for name, value in [*norm.named_parameters(), *norm.named_buffers()]:
        if value.dtype == torch.float32:
            centre = 1.0 if name in ("weight", "running_var") else 0.0
            value.data = centre + 0.2 * torch.randn(value.shape).clamp(-2, 2)
    return norm


CASES: tuple[Case, ...] = (
    *_fused(), *_clamps(), *_prelu(), *_softmax(), *_sums(), *_activations(), *_functions(), *_deviations(),
    *_masks(), *_norms(),
)  # fmt: skip

GRANULES, SPLIT = (1, 8, 6, 6), (1, 12, 6, 6)

REJECTED: tuple[Rejected, ...] = (
    Rejected("add", "has_nonzero_alpha", "", of(lambda x, y: torch.add(x, y, alpha=0)), ((4, 5), (4, 5))),
    Rejected("sub", "has_nonzero_alpha", "", of(lambda x, y: torch.sub(x, y, alpha=0)), ((4, 5), (4, 5))),
    Rejected("clamp", "is_a_relu", "", of(lambda x: x.clamp(-2, 3)), (GRANULES,)),
    Rejected("prelu", "has_rank_for_slopes", "", lambda: nn.PReLU(8), ((1, 8, 1, 1, 1, 1, 1, 1, 2),)),
    Rejected("prelu", "has_aligned_slopes", "", lambda: nn.PReLU(12), (SPLIT,), padded=True),
    Rejected("prelu", "has_aligned_slopes", "one slope", nn.PReLU, (SPLIT,), padded=True),
    Rejected("prelu", "has_aligned_slopes", "rank 1", nn.PReLU, ((8,),)),
    Rejected("softmax", "is_over_the_channels", "rank 2", of(lambda x: x.softmax(0)), ((8, 5),)),
    Rejected("softmax", "is_over_the_channels", "rank 4", of(lambda x: x.softmax(2)), ((1, 4, 8, 3),)),
    Rejected("softplus", "has_high_threshold", "", of(lambda x: F.softplus(x, threshold=1.0)), (IMAGE,)),
    Rejected("logit", "has_an_epsilon", "", of(lambda x: torch.logit(x.sigmoid())), (IMAGE,)),
    Rejected("logit", "has_an_epsilon", "rounds to 0", of(lambda x: torch.logit(x.sigmoid(), 2.0**-25)), (IMAGE,)),
    Rejected("pow", "has_one_exponent", "", of(lambda x, y: (x.abs() + 1) ** y), (IMAGE, IMAGE)),
    Rejected("pow", "has_supported_exponent", "", of(lambda x: x**-1), (IMAGE,)),
    Rejected("pow of a number", "has_positive_base", "", of(lambda x: 0.0 ** x.abs()), (IMAGE,)),
    Rejected("reciprocal", "inverts_no_negative", "", of(lambda x: 1 / x), (IMAGE,)),
    Rejected("reciprocal", "inverts_no_negative", "of observed values above 0", of(lambda x: 1 / (x + 9)), (IMAGE,)),
    Rejected("pow", "has_supported_exponent", "of observed values above 0", of(lambda x: (x + 9) ** -1), (IMAGE,)),
    Rejected("div", "has_no_negative_divisor", "by observed values above 0", of(lambda x, y: x / (y + 9)),
             (IMAGE, IMAGE)),
    Rejected("div", "has_no_zero_divisor", "", of(lambda x: (x / 0.0).atan()), (IMAGE,)),
    Rejected("div", "has_no_negative_divisor", "", of(lambda x, y: x / y), (IMAGE, IMAGE)),
    Rejected("where", "chooses_by_a_constant", "", of(lambda x: torch.where(x.isnan(), x, 0.5)), (IMAGE,)),
    Rejected("where", "fills_in_small_numbers", "", of(lambda m, c, x: torch.where(m, x, c), MASK, CHANNELS * 1e3),
             (IMAGE,)),
    Rejected("group_norm", "has_constant_affine", "", of(lambda x, w: F.group_norm(x, 2, w)), (IMAGE, (4,))),
)  # fmt: skip

"""Each module of torch.nn, each function of torch.nn.functional, and simple functions of torch.

Each becomes a program that runs and follows the converted module, or raises a typed error that names the operator
before calibration.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.flow_support import seeded, worst_lsb
from torch import nn

from openneutron import lower, quantize
from openneutron.errors import OpenNeutronError

Inputs = tuple[torch.Tensor, ...]

ROW, LINE, IMAGE, VOLUME, STEPS = (2, 8), (1, 4, 16), (1, 4, 8, 8), (1, 2, 4, 6, 6), (1, 6, 8)
SHAPES = {"row": ROW, "line": LINE, "image": IMAGE, "volume": VOLUME, "steps": STEPS}
# Several operators in sequence may each round a tie in another direction. The root in LPPool enlarges this near zero.
TOLERANCE = 4
TOLERANCE_OF_ROOTS = 16
ROWS_AT_ONCE = 12


def _modules(kind: str) -> dict[str, Callable[[], nn.Module]]:
    """Returns, by class name, the modules that read a value of this kind."""
    found: dict[str, Callable[[], nn.Module]] = {}
    if kind == "line":
        plain = (
            "ReLU ReLU6 ELU CELU SELU GELU SiLU Mish Sigmoid Tanh LogSigmoid Hardsigmoid Hardtanh Hardswish Hardshrink "
            "Softshrink Softplus Softsign Tanhshrink LeakyReLU RReLU PReLU GLU Identity Dropout Dropout1d AlphaDropout "
            "FeatureAlphaDropout"
        )
        found = {name: getattr(nn, name) for name in plain.split()}
        found |= {name: functools.partial(getattr(nn, name), dim=1) for name in ("Softmax", "Softmin", "LogSoftmax")}
        found["Threshold"] = lambda: nn.Threshold(0.1, 0.0)
        found["Upsample"] = lambda: nn.Upsample(scale_factor=2)
    if kind == "image":
        found = {
            "Softmax2d": nn.Softmax2d, "Dropout2d": nn.Dropout2d, "Flatten": nn.Flatten,
            "GroupNorm": lambda: nn.GroupNorm(2, 4), "LocalResponseNorm": lambda: nn.LocalResponseNorm(3),
            "SyncBatchNorm": lambda: nn.SyncBatchNorm(4), "PixelShuffle": lambda: nn.PixelShuffle(2),
            "PixelUnshuffle": lambda: nn.PixelUnshuffle(2), "ChannelShuffle": lambda: nn.ChannelShuffle(2),
            "UpsamplingNearest2d": lambda: nn.UpsamplingNearest2d(scale_factor=2),
            "UpsamplingBilinear2d": lambda: nn.UpsamplingBilinear2d(scale_factor=2),
            "Unfold": lambda: nn.Unfold(2), "Unflatten": lambda: nn.Unflatten(1, (2, 2)),
        }  # fmt: skip
    if kind == "volume":
        found = {"Dropout3d": nn.Dropout3d}
    if kind == "steps":
        found = {
            "LayerNorm": lambda: nn.LayerNorm(8), "RMSNorm": lambda: nn.RMSNorm(8), "Linear": lambda: nn.Linear(8, 5),
            "LazyLinear": lambda: nn.LazyLinear(5), "RNN": lambda: nn.RNN(8, 4), "LSTM": lambda: nn.LSTM(8, 4),
            "GRU": lambda: nn.GRU(8, 4),
            "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        }  # fmt: skip
    rank = {"line": 1, "image": 2, "volume": 3}.get(kind)
    if rank is not None:
        channels = SHAPES[kind][1]
        of_rank: dict[str, tuple[Any, ...]] = {
            "Conv": (channels, 6, 3), "ConvTranspose": (channels, 6, 3), "LazyConv": (6, 3),
            "LazyConvTranspose": (6, 3), "MaxPool": (2,), "AvgPool": (2,), "AdaptiveAvgPool": (2,),
            "AdaptiveMaxPool": (2,), "BatchNorm": (channels,), "LazyBatchNorm": (),
            "InstanceNorm": (channels,), "LazyInstanceNorm": (), "ReflectionPad": (1,), "ReplicationPad": (1,),
            "ZeroPad": (1,), "ConstantPad": (1, 0.5), "CircularPad": (1,),
        }  # fmt: skip
        for name, arguments in of_rank.items():
            found[f"{name}{rank}d"] = functools.partial(getattr(nn, f"{name}{rank}d"), *arguments)
    return found


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


class Side(nn.Module):
    """Applies each part to the same inputs."""

    def __init__(self, parts: Sequence[Callable[..., Any]]) -> None:
        super().__init__()
        self.owned = nn.ModuleList(part for part in parts if isinstance(part, nn.Module))
        self.functions = list(parts)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(_first(function(*inputs)) for function in self.functions)


def _sides(parts: Sequence[Callable[[], Any]], shape: Inputs) -> nn.Module:
    """Returns the sides. A first call gives lazy modules their parameters."""

    def build() -> nn.Module:
        model = Side([part() for part in parts]).eval()
        with torch.no_grad():
            model(*(value.clone() for value in shape))
        return model

    return seeded(build)


Parts = dict[str, Callable[[], Any]]


def refused_of(parts: Parts, samples: Sequence[Inputs], tolerance: int = TOLERANCE) -> set[str]:
    """Returns the names of rejected parts, each with a typed error that names an operator.

    Parts that can form one program are tested as one program.
    """
    model = _sides(list(parts.values()), samples[0])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantized = quantize(model, samples[0], samples, recover=None, progress=False)
    except OpenNeutronError as error:
        if len(parts) == 1:
            return set(parts) if "aten." in str(error) else set()
        names = list(parts)
        halves = names[: len(names) // 2], names[len(names) // 2 :]
        return set().union(*(refused_of({name: parts[name] for name in half}, samples, tolerance) for half in halves))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = lower(quantized)
    assert worst_lsb(quantized.module, program.run, samples) <= tolerance, list(parts)
    return set()


def _constant(function: Callable[..., Any]) -> Callable[[], Any]:
    """Returns a function without parameters as a module."""
    return lambda: function


def samples_of_shapes(*shapes: tuple[int, ...], count: int = 2, positive: bool = False) -> list[Inputs]:
    generator = torch.Generator().manual_seed(0)
    made = [tuple(torch.randn(shape, generator=generator) for shape in shapes) for _ in range(count)]
    return [tuple(value.abs() + 0.2 for value in sample) for sample in made] if positive else made


def in_groups(parts: Parts) -> list[Parts]:
    names = list(parts)
    starts = range(0, len(names), ROWS_AT_ONCE)
    return [{name: parts[name] for name in names[start : start + ROWS_AT_ONCE]} for start in starts]


MODULES = [(kind, parts) for kind in SHAPES if kind != "row" for parts in in_groups(_modules(kind))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "parts"), MODULES, ids=lambda value: value if isinstance(value, str) else next(iter(value))
)
def test_modules_of_one_input(kind: str, parts: Parts) -> None:
    assert refused_of(parts, samples_of_shapes(SHAPES[kind])) == set()


def test_a_few_modules() -> None:
    some = {name: make for name, make in _modules("line").items() if name in ("ReLU", "GELU", "Conv1d", "AvgPool1d")}
    assert refused_of(some, samples_of_shapes(LINE)) == set()


OTHERS: dict[str, tuple[Callable[[], Any], tuple[tuple[int, ...], ...]]] = {
    "Bilinear": (lambda: nn.Bilinear(8, 8, 4), (ROW, ROW)),
    "RNNCell": (lambda: nn.RNNCell(8, 4), (ROW, (2, 4))),
    "GRUCell": (lambda: nn.GRUCell(8, 4), (ROW, (2, 4))),
    "LSTMCell": (lambda: _on(lambda cell, x, h: cell(x, (h, h)), nn.LSTMCell(8, 4)), (ROW, (2, 4))),
    "MultiheadAttention": (lambda: _on(lambda a, x: a(x, x, x), nn.MultiheadAttention(8, 2)), (STEPS,)),
    "TransformerDecoderLayer": (
        lambda: _on(lambda t, x: t(x, x), nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)), (STEPS,),
    ),
    "LPPool1d": (lambda: nn.LPPool1d(2, 2), (LINE,)),
    "LPPool2d": (lambda: nn.LPPool2d(2, 2), (IMAGE,)),
    "LPPool3d": (lambda: nn.LPPool3d(2, 2), (VOLUME,)),
    "Fold": (lambda: nn.Fold((4, 4), 2, stride=2), ((1, 8, 4),)),
    "CosineSimilarity": (nn.CosineSimilarity, (ROW, ROW)),
    "PairwiseDistance": (nn.PairwiseDistance, (ROW, ROW)),
    "AdaptiveLogSoftmaxWithLoss": (
        lambda: _on(lambda a, x: a.log_prob(x), nn.AdaptiveLogSoftmaxWithLoss(8, 10, [4])), (ROW,),
    ),
    **{
        name: (getattr(nn, name), (ROW, ROW))
        for name in ("L1Loss", "MSELoss", "HuberLoss", "SmoothL1Loss", "SoftMarginLoss", "BCEWithLogitsLoss")
    },
}  # fmt: skip


def _on(function: Callable[..., Any], module: nn.Module) -> nn.Module:
    return _Called(function, module)


class _Called(nn.Module):
    def __init__(self, function: Callable[..., Any], module: nn.Module) -> None:
        super().__init__()
        self.function, self.module = function, module

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(self.module, *inputs)


@pytest.mark.slow
def test_modules_of_other_inputs() -> None:
    for shapes in dict.fromkeys(shapes for _, shapes in OTHERS.values()):
        parts = {name: make for name, (make, own) in OTHERS.items() if own == shapes}
        tolerance = TOLERANCE_OF_ROOTS if any("LPPool" in name for name in parts) else TOLERANCE
        assert refused_of(parts, samples_of_shapes(*shapes), tolerance) == set()


REFUSED: dict[str, tuple[Callable[[], Any], Callable[[], Inputs]]] = {
    "FractionalMaxPool2d": (lambda: nn.FractionalMaxPool2d(2, output_size=3), lambda: samples_of_shapes(IMAGE)[0]),
    "FractionalMaxPool3d": (lambda: nn.FractionalMaxPool3d(2, output_size=2), lambda: samples_of_shapes(VOLUME)[0]),
    "MaxUnpool3d": (
        lambda: _on(lambda p, x: nn.MaxUnpool3d(2)(*p(x)), nn.MaxPool3d(2, return_indices=True)),
        lambda: samples_of_shapes(VOLUME)[0],
    ),
    "CrossMapLRN2d": (lambda: nn.CrossMapLRN2d(3), lambda: samples_of_shapes(IMAGE)[0]),
    "HingeEmbeddingLoss": (nn.HingeEmbeddingLoss, lambda: samples_of_shapes(ROW, ROW)[0]),
    "CosineEmbeddingLoss": (nn.CosineEmbeddingLoss, lambda: samples_of_shapes(ROW, ROW, (2,))[0]),
    "det": (lambda: lambda x: torch.linalg.det(x[:, :2]), lambda: samples_of_shapes(ROW)[0]),
    "median": (lambda: torch.median, lambda: samples_of_shapes(ROW)[0]),
    "sort": (lambda: lambda x: torch.sort(x, 1)[0], lambda: samples_of_shapes(ROW)[0]),
}


@pytest.mark.parametrize("name", ["sort", *(pytest.param(n, marks=pytest.mark.slow) for n in REFUSED if n != "sort")])
def test_operators_without_a_kernel_are_refused_by_name(name: str) -> None:
    make, sample = REFUSED[name]
    assert refused_of({name: make}, [sample()] * 2) == {name}


# Containers, modules that only train or only wrap others, and losses, which a program does not compute.
NOT_IN_PROGRAMS = {
    "Container", "Module", "ModuleDict", "ModuleList", "ParameterDict", "ParameterList", "Sequential", "Parameter",
    "UninitializedBuffer", "UninitializedParameter", "Buffer", "DataParallel", "CTCLoss", "GaussianNLLLoss",
    "LinearCrossEntropyLoss", "BCELoss", "CrossEntropyLoss", "KLDivLoss", "MarginRankingLoss", "MultiLabelMarginLoss",
    "MultiLabelSoftMarginLoss", "MultiMarginLoss", "NLLLoss", "NLLLoss2d", "PoissonNLLLoss", "TripletMarginLoss",
    "TripletMarginWithDistanceLoss",
}  # fmt: skip
# Modules that are part of a tested layer, or that have tests of their own.
MADE_OF_OTHERS = {
    "RNNBase", "RNNCellBase", "Transformer", "TransformerEncoder", "TransformerDecoder", "Embedding", "EmbeddingBag",
    "MaxUnpool1d", "MaxUnpool2d",
}  # fmt: skip


def test_every_module_of_torch_nn_is_here() -> None:
    known = {name for kind in SHAPES for name in _modules(kind)} | OTHERS.keys() | REFUSED.keys()
    modules = {name for name, value in vars(nn).items() if inspect.isclass(value) and issubclass(value, nn.Module)}
    assert modules - known - NOT_IN_PROGRAMS - MADE_OF_OTHERS == set()


UNARY = (
    "abs acos acosh asin asinh atan atanh ceil cos cosh erf exp exp2 expm1 floor frac log log10 log1p log2 neg "
    "reciprocal round rsqrt sigmoid sign sin sinc sinh sqrt square tan tanh trunc relu selu logit isnan isfinite "
    "deg2rad rad2deg nan_to_num erfc angle signbit"
)
BINARY = (
    "add sub mul div floor_divide fmod remainder pow maximum minimum atan2 logaddexp eq ne lt "
    "le gt ge logical_and logical_or logical_xor kron xlogy cdist fmax fmin hypot copysign dist"
)
ROW_FUNCTIONS: dict[str, Callable[[torch.Tensor], Any]] = {
    "cumsum": lambda x: torch.cumsum(x, 1), "flip": lambda x: torch.flip(x, (1,)), "roll": lambda x: x.roll(1, 1),
    "topk": lambda x: torch.topk(x, 2)[0], "logsumexp": lambda x: torch.logsumexp(x, 1), "tril": torch.tril,
    "var": lambda x: x.var(1), "std": lambda x: x.std(1), "prod": lambda x: x.prod(1), "norm": lambda x: x.norm(dim=1),
    "argmax": lambda x: x.argmax(1), "amax": lambda x: x.amax(1), "all": lambda x: (x > 0).all(), "diff": torch.diff,
    "take": lambda x: x.take(torch.tensor([1, 3])), "tile": lambda x: x.tile(2, 2),
    "unfold": lambda x: x.unfold(1, 4, 2),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1), "index_select": lambda x: x[:, [1, 3]],
    "scatter": lambda x: x.scatter(1, torch.tensor([[1], [0]]), 0.5), "diagonal": lambda x: x.diagonal(),
}  # fmt: skip
FUNCTIONS_OF_ROWS = (
    "celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish normalize relu6 rrelu selu "
    "silu softplus softshrink softsign tanhshrink threshold log_softmax softmax softmin"
)


def _function(name: str) -> Callable[[torch.Tensor], Any]:
    function = getattr(F, name)
    if name == "threshold":
        return lambda x: F.threshold(x, 0.1, 0.0)
    return (lambda x: function(x, dim=1)) if name in ("log_softmax", "softmax", "softmin") else function


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, len(UNARY.split()), ROWS_AT_ONCE))
def test_functions_of_one_value(first: int) -> None:
    names = UNARY.split()[first : first + ROWS_AT_ONCE]
    parts = {name: _constant(functools.partial(_in_domain, name)) for name in names}
    assert refused_of(parts, samples_of_shapes(ROW, positive=True)) == set()


def _in_domain(name: str, x: torch.Tensor) -> Any:
    """Maps values to the domain of the function."""
    return getattr(torch, name)(_domain(name, x))


def _domain(name: str, x: torch.Tensor) -> torch.Tensor:
    if name in ("acos", "asin", "atanh", "logit"):
        return torch.sigmoid(x) * 0.9
    return x + 1 if name == "acosh" else x


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, len(BINARY.split()), ROWS_AT_ONCE))
def test_functions_of_two_values(first: int) -> None:
    names = BINARY.split()[first : first + ROWS_AT_ONCE]
    parts = {name: _constant(getattr(torch, name)) for name in names}
    assert refused_of(parts, samples_of_shapes(ROW, ROW, positive=True)) == set()


@pytest.mark.slow
def test_functions_of_rows() -> None:
    parts = {name: _constant(function) for name, function in ROW_FUNCTIONS.items()}
    parts |= {name: _constant(_function(name)) for name in FUNCTIONS_OF_ROWS.split()}
    for group in in_groups(parts):
        assert refused_of(group, samples_of_shapes(ROW)) == set()

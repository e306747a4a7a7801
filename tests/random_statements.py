"""The statements of random models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from tests.random_table import EXPRESSIONS, IN_PLACE, MODULES

__all__ = ["Drawn", "Table", "statement", "statement_of_table"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Drawn:
    """Lines of `forward` that compute one value, and lines of `__init__` for the modules and buffers that they use."""

    lines: tuple[str, ...]
    parts: tuple[str, ...] = ()


ELEMENTWISE = (
    "F.relu({v})", "F.relu6({v})", "torch.sigmoid({v})", "torch.tanh({v})", "F.hardswish({v})", "F.hardsigmoid({v})",
    "F.silu({v})", "F.gelu({v})", "F.gelu({v}, approximate='tanh')", "F.elu({v})", "F.leaky_relu({v}, 0.1)",
    "F.softplus({v})", "F.mish({v})", "F.selu({v})", "F.celu({v})", "F.logsigmoid({v})", "F.softsign({v})",
    "F.tanhshrink({v})", "F.hardshrink({v}, 0.5)", "F.softshrink({v}, 0.5)", "F.threshold({v}, 0.2, 0.0)",
    "F.hardtanh({v}, -0.5, 1.5)", "{v}.clamp(min=-1)", "{v}.clamp(max=0.7)", "{v}.clamp(-2, 2)", "{v}.abs()", "-{v}",
    "{v}.clamp(-3, 3).exp()", "({v}.abs() + 0.1).sqrt()", "({v}.abs() + 0.5).rsqrt()", "({v}.abs() + 0.5).log()",
    "1 / ({v}.abs() + 0.5)", "{v} ** 2", "{v} ** 3", "{v}.square()", "torch.sign({v})", "torch.floor({v})",
    "torch.round({v})", "torch.ceil({v})", "torch.erf({v})", "torch.sin({v})", "torch.cos({v})",
    "torch.log1p({v}.abs())", "torch.expm1({v}.clamp(-2, 2))", "{v} * 2.5", "{v} + 1.5", "1 - {v}", "{v} / 3",
    "{v} * ({v} > 0.3)", "{v} * ({v} > 0.3).float()", "torch.where({v} > 0, {v}, 0.1 * {v})",
    "{v}.masked_fill({v} > 1, 0.0)", "{v}.masked_fill({v}.abs() < 0.2, -0.5)", "F.dropout({v}, 0.5, self.training)",
    "{v}.detach()", "{v}.contiguous()", "{v}.clone()", "{v}.float()", "{v} - {v}.mean()", "{v} + 0 * {v}", "{v} * 0",
    "torch.lerp({v}, {v}.relu(), 0.25)", "torch.addcmul({v}, {v}, {v}.sigmoid(), value=0.5)",
    "torch.addcdiv({v}, {v}, {v}.abs() + 1)", "torch.nan_to_num({v})", "torch.reciprocal({v}.abs() + 1)",
    "torch.full_like({v}, 0.5) * {v}", "F.relu({v}, inplace=True)", "{v}.fmod(1.5)", "torch.atan({v})",
    "{v} * torch.ones_like({v})", "torch.zeros_like({v}) + {v}",
)  # fmt: skip
BINARY = (
    "{v} + {w}", "{v} - {w}", "{v} * {w}", "torch.maximum({v}, {w})", "torch.minimum({v}, {w})",
    "{v} / ({w}.abs() + 1)", "torch.add({v}, {w}, alpha=2)", "torch.sub({v}, {w}, alpha=0.5)",
    "torch.where({v} > {w}, {v}, {w})", "torch.where({v} > 0, {w}, {v})", "torch.lerp({v}, {w}, 0.3)",
    "{v} * torch.sigmoid({w})", "torch.hypot({v}, {w})", "torch.addcmul({v}, {w}, {w})", "({v} - {w}).abs()",
    "({v} * {w}).sum(-1)", "F.cosine_similarity({v}, {w}, dim=-1)", "torch.stack([{v}, {w}])",
    "torch.stack([{v}, {w}], -1)", "torch.cat([{v}, {w}], {d})", "torch.cat([{w}, {v}, {w}], -1)",
    "{v} @ {w}.transpose(-1, -2)", "{v}.matmul({w})", "torch.cat([{v}[..., :0], {w}], -1)", "torch.dist({v}, {w})",
    "F.pairwise_distance({v}, {w})", "torch.cdist({v}, {w})", "torch.outer({v}.flatten()[:8], {w}.flatten()[:8])",
)  # fmt: skip
REDUCTIONS = (
    "{v}.mean({d})", "{v}.mean({d}, keepdim=True)", "{v}.sum({d})", "{v}.sum({d}, keepdim=True)", "{v}.amax({d})",
    "{v}.amin({d}, keepdim=True)", "{v}.max({d})[0]", "{v}.min({d}).values", "{v}.var({d})",
    "{v}.std({d}, keepdim=True)", "{v}.norm(dim={d})", "torch.logsumexp({v}, {d})", "F.softmax({v}, {d})",
    "F.log_softmax({v}, {d})", "F.softmin({v}, {d})", "F.normalize({v}, dim={d})", "{v}.mean()", "{v}.sum()",
    "{v}.max()", "{v} - {v}.mean({d}, keepdim=True)", "{v} / ({v}.abs().sum({d}, keepdim=True) + 0.1)",
    "{v}.cumsum({d})", "{v}.prod({d})", "{v}.mean((0, -1))", "{v}.softmax({d}) * {v}",
    "{v}.mean(-1, keepdim=True) + {v}.mean(0, keepdim=True)", "F.glu({v}, {d})", "torch.topk({v}, 1, {d})[0]",
    "{v}.sort({d})[0]", "torch.var_mean({v}, {d})[1]", "{v}.median({d})[0]",
)  # fmt: skip
MOVES = (
    "{v}.flatten()", "{v}.flatten(1)", "{v}.flatten({d})", "{v}.reshape(-1)", "{v}.view(-1)", "{v}.view({v}.shape)",
    "{v}.reshape({v}.shape[0], -1)", "{v}.unsqueeze({d})", "{v}.squeeze()", "{v}.squeeze({d})", "{v}.unsqueeze(-1)",
    "{v}.transpose({d}, {e})", "{v}.transpose({d}, {e}).contiguous()", "{v}.movedim({d}, {e})", "{v}.permute({p})",
    "{v}.permute({p}).contiguous()", "{v}.permute({p}).reshape(-1, {v}.shape[-1])", "{v}.chunk(2, {d})[0]",
    "{v}.split(2, {d})[-1]", "torch.cat({v}.chunk(2, {d})[::-1], {d})", "{v}.narrow({d}, 0, 1)", "{v}.select({d}, 0)",
    "{v}.unbind({d})[-1]", "{v}[..., 1:]", "{v}[..., ::2]", "{v}[1:]", "{v}[:, 1:-1]", "{v}[..., -1]",
    "{v}[..., None]", "{v}[None]", "{v}[:, [1, 0]]", "{v}[..., [0, 2, 1]]",
    "{v}.index_select({d}, torch.tensor([0, 0]))", "{v}.roll(1, {d})", "{v}.flip({d})",
    "{v}.repeat(2, *[1] * ({v}.dim() - 1))", "{v}.repeat_interleave(2, {d})", "{v}.expand(2, *{v}.shape)",
    "{v}.mean({d}, keepdim=True).expand_as({v})", "F.pad({v}, (1, 1))", "F.pad({v}, (1, 0), value=0.5)",
    "F.pad({v}, (0, 1, 1, 0))", "F.pad({v}, (1, 1), mode='reflect')", "F.pad({v}, (2, 1), mode='replicate')",
    "F.pad({v}, (-1, 0))", "F.pad({v}, (1, 1), mode='circular')", "{v}.tile(2)", "{v}.unfold(-1, 3, 2)",
    "{v}.unfold(-1, 2, 2)", "torch.diff({v})", "torch.tril({v})", "torch.triu({v}, 1)", "{v}.rot90(1, (-2, -1))",
    "{v}.swapaxes({d}, {e})", "{v}.T", "{v}.mT", "{v}.diagonal()", "torch.cat([{v}, {v}[..., :0]], -1)",
    "torch.cat([{v}] * 3, {d})", "{v}.reshape(-1, 2)", "{v}.unflatten(-1, (2, -1))",
    "torch.stack({v}.unbind({d}), {e})", "torch.gather({v}, {d}, torch.zeros_like({v}, dtype=torch.long))",
    "torch.meshgrid({v}.flatten()[:3], {v}.flatten()[:2], indexing='ij')[0]",
)  # fmt: skip
WRITES = (
    ("{n} = {v}.clone()", "{n}[..., :1] = F.relu({n}[..., :1])"),
    ("{n} = {v} * 1.5", "{n}[:, 1:] = 0"),
    ("{n} = {v} + 1", "{n}[:, :1].mul_(2)"),
    ("{n} = {v}.neg()", "{n}[..., -1] += 1"),
    ("{n} = torch.zeros_like({v})", "{n}[..., 1:] = {v}[..., :-1]"),
    ("{n} = torch.zeros_like({v})", "{n}[:-1] = {v}[1:]", "{n}[:, 1:] = {v}[:, 1:]"),
    ("{n} = {v}.sigmoid()", "{n}[..., ::2] = {v}[..., ::2]"),
    ("{n} = {v} * 2", "{n}.view(-1)[0] = 0"),
    ("{n} = {v}.abs()", "{n}.clamp_(max=1)", "{n}.add_({v})"),
    ("{n} = torch.empty_like({v})", "{n}.copy_({v})", "{n}[..., 0].fill_(0.5)"),
)
STATES = (  # Lines of `forward`, and the initial value of the buffer that they read and write.
    (("{n} = 0.5 * self.m{part} + {v}", "self.m{part} = {n}"), "torch.zeros({shape})"),
    (("{n} = 0.5 * self.m{part} + torch.tanh({v})", "self.m{part}.copy_({n})"), "torch.full({shape}, 0.5)"),
    (("self.m{part}.mul_(0.9).add_(0.1 * {v})", "{n} = {v} - self.m{part}"), "torch.zeros({shape})"),
    (("{n} = torch.cat([self.m{part}, {v}], -1)", "self.m{part}[:] = {n}[..., -{last}:]"), "torch.ones({shape})"),
    (("{n} = torch.stack([{v}, self.m{part}]).amax(0)", "self.m{part}.copy_({v})"), "torch.zeros({shape})"),
    (("{n} = {v} @ self.m{part}.transpose(-1, -2)", "self.m{part} = {v} + 1"), "torch.zeros({shape})"),
)
REGIONS = (
    ("with torch.no_grad():", "    {n} = F.relu({v} * 1.5)"),
    ("with torch.autocast('cpu', enabled=False):", "    {n} = {v}.float() * torch.sigmoid({v}.float())"),
    ("with torch.inference_mode():", "    {n} = {v}.tanh()"),
    ("with torch.set_grad_enabled(False):", "    {n} = {v}.abs()"),
)
MASKED = (
    "{v}.masked_fill({m}, -1e9)", "torch.where({m}, {v}, -1e4)", "{v}.masked_fill({m}, float('-inf')).softmax(-1)",
    "({v}.masked_fill(~{m}, -1e9)).softmax(-1) @ {v}.transpose(-1, -2)", "{v} * {m}", "{v} * (~{m}).float()",
)  # fmt: skip
Table = str | tuple[str, str]
TABLE: tuple[Table, ...] = (*EXPRESSIONS, *IN_PLACE, *MODULES)
ADDED = ("{v} + {m}", "({v} + {m}).softmax(-1)", "({v} * 0.5 + {m}).softmax(-1) * {v}")


def statement(random: Random, name: str, value: str, shapes: Mapping[str, Shape], part: int) -> Drawn:
    """Draws a statement that computes `name` from `value`, and optionally from others of `shapes`.

    `part` numbers the modules that it creates. Values whose names begin with "mask" are masks.
    """
    masks = [other for other in shapes if other.startswith("mask")]
    kinds: list[tuple[int, Callable[[], Drawn]]] = [
        (28, lambda: _line(random, name, value, shapes, ELEMENTWISE)),
        (16, lambda: _binary(random, name, value, shapes)),
        (12, lambda: _line(random, name, value, shapes, REDUCTIONS)),
        (22, lambda: _line(random, name, value, shapes, MOVES)),
        (30, lambda: _module(random, name, value, shapes[value], part)),
        (4, lambda: _lines(name, value, random.choice(WRITES))),
        (3, lambda: _lines(name, value, random.choice(REGIONS))),
        (2, lambda: _state(random, name, value, shapes[value], part)),
        (24, lambda: statement_of_table(random, name, value, shapes, part, text=random.choice(TABLE))),
        (12 if masks else 0, lambda: _masked(random, name, value, masks)),
    ]
    weights = [weight for weight, _ in kinds]
    return random.choices([draw for _, draw in kinds], weights)[0]()


def _fill(random: Random, text: str, value: str, shape: Shape, **names: str) -> str:
    rank = max(1, len(shape))
    order = list(range(len(shape)))
    random.shuffle(order)
    dim, other = random.randrange(rank), random.randrange(rank)
    negative = random.random() < 0.3
    return text.format(
        v=value, d=dim - rank if negative else dim, e=other, p=", ".join(map(str, order)) or "()", **names
    )


def _line(random: Random, name: str, value: str, shapes: Mapping[str, Shape], texts: Sequence[str]) -> Drawn:
    return Drawn((f"{name} = {_fill(random, random.choice(texts), value, shapes[value])}",))


def _lines(name: str, value: str, texts: Sequence[str]) -> Drawn:
    return Drawn(tuple(text.format(n=name, v=value) for text in texts))


def _state(random: Random, name: str, value: str, shape: Shape, part: int) -> Drawn:
    texts, initial = random.choice(STATES)
    facts = {"n": name, "v": value, "part": part, "shape": shape, "last": shape[-1] if shape else 1}
    buffer = f"self.register_buffer('m{part}', {initial.format(**facts)})"
    return Drawn(tuple(text.format(**facts) for text in texts), (buffer,))


def _binary(random: Random, name: str, value: str, shapes: Mapping[str, Shape]) -> Drawn:
    shape = shapes[value]
    alike = [other for other, found in shapes.items() if not other.startswith("mask") and found == shape]
    others = alike if random.random() < 0.7 else [other for other in shapes if not other.startswith("mask")]
    text = _fill(random, random.choice(BINARY), value, shape, w=random.choice(others))
    return Drawn((f"{name} = {text}",))


def statement_of_table(
    random: Random, name: str, value: str, shapes: Mapping[str, Shape], part: int, *, text: Table
) -> Drawn:
    """Returns the statement of one entry of `TABLE`, with random dimensions and other values of the same shape."""
    shape = shapes[value]
    alike = [other for other, found in shapes.items() if not other.startswith("mask") and found == shape]
    sizes = {"f": str(shape[-1] if shape else 1), "c": str(shape[1] if len(shape) > 1 else 1), "part": str(part)}

    def filled(template: str) -> str:
        return _fill(random, template, value, shape, n=name, w=random.choice(alike), **sizes)

    if not isinstance(text, str):
        expression, module = text
        return Drawn((f"{name} = {filled(expression)}",), (f"self.m{part} = {filled(module)}",))
    if text in IN_PLACE:
        return Drawn((f"{name} = {value} * 1", filled(text)))
    return Drawn((f"{name} = {filled(text)}",))


def _masked(random: Random, name: str, value: str, masks: Sequence[str]) -> Drawn:
    text = random.choice(MASKED + ADDED).format(v=value, m=random.choice(masks))
    return Drawn((f"{name} = {text}",))


def _module(random: Random, name: str, value: str, shape: Shape, part: int) -> Drawn:
    makers = _MODULES.get(len(shape), _vector_modules)
    made = random.choice(makers(random, shape))
    suffix = "[0]" if made.startswith(("nn.LSTM", "nn.GRU", "nn.RNN", "nn.MultiheadAttention")) else ""
    arguments = f"{value}, {value}, {value}" if made.startswith("nn.MultiheadAttention") else value
    return Drawn((f"{name} = self.m{part}({arguments}){suffix}",), (f"self.m{part} = {made}",))


def _vector_modules(random: Random, shape: Shape) -> list[str]:
    features = shape[-1] if shape else 1
    out = random.choice([1, 4, 8, 10])
    bias = random.random() < 0.8
    return [
        f"nn.Linear({features}, {out}, bias={bias})",
        f"nn.Linear({features}, {features})",
        f"nn.Sequential(nn.Linear({features}, {out}), nn.ReLU(), nn.Linear({out}, {features}))",
        f"nn.LayerNorm({features})",
        "nn.PReLU()",
        f"nn.RMSNorm({features})",
    ]


def _matrix_modules(random: Random, shape: Shape) -> list[str]:
    rows, features = shape
    return [
        *_vector_modules(random, shape),
        f"nn.BatchNorm1d({features})",
        f"nn.Sequential(nn.Linear({features}, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU())",
        f"nn.Conv1d({rows}, 4, 3, padding=1)",
        f"nn.ConvTranspose1d({rows}, 4, 2, stride=2)",
        "nn.AvgPool1d(2)",
        "nn.MaxPool1d(2)",
    ]


def _sequence_modules(random: Random, shape: Shape) -> list[str]:
    batch, channels, length = shape
    out = random.choice([2, 4, 8])
    return [
        *_vector_modules(random, shape),
        f"nn.Conv1d({channels}, {out}, 3, padding=1)",
        f"nn.Conv1d({channels}, {channels}, 3, groups={channels})",
        f"nn.Conv1d({channels}, {out}, 3, dilation=2, padding='same')",
        f"nn.Sequential(nn.Conv1d({channels}, {out}, 1, bias=False), nn.BatchNorm1d({out}), nn.ReLU())",
        f"nn.ConvTranspose1d({channels}, {out}, 4, stride=2, padding=1)",
        f"nn.BatchNorm1d({channels})",
        f"nn.GroupNorm(1, {channels})",
        f"nn.Conv2d({batch}, {out}, 3, padding=1)",
        f"nn.ConvTranspose2d({batch}, {out}, 2)",
        f"nn.GRU({length}, 4, batch_first=True)",
        f"nn.LSTM({length}, 4, batch_first=True)",
        f"nn.MultiheadAttention({length}, 1, batch_first=True)",
        "nn.MaxPool1d(2)",
        "nn.AvgPool1d(2, stride=1)",
        "nn.AdaptiveAvgPool1d(1)",
        "nn.Upsample(scale_factor=2)",
        f"nn.InstanceNorm1d({channels}, affine=True)",
    ]


def _image_modules(random: Random, shape: Shape) -> list[str]:
    channels = shape[1]
    out = random.choice([1, 3, 4, 8])
    kernel, stride, padding = random.choice([1, 2, 3]), random.choice([1, 1, 2]), random.choice([0, 1])
    bias = random.random() < 0.8
    return [
        f"nn.Conv2d({channels}, {out}, {kernel}, stride={stride}, padding={padding}, bias={bias})",
        f"nn.Conv2d({channels}, {out}, 3, padding=1)",
        f"nn.Conv2d({channels}, {channels}, 3, padding=1, groups={channels})",
        f"nn.Conv2d({channels}, {2 * channels}, 1, groups={channels})",
        f"nn.Conv2d({channels}, {out}, 3, dilation=2, padding=2, padding_mode='reflect')",
        f"nn.Sequential(nn.Conv2d({channels}, {out}, 3, bias=False), nn.BatchNorm2d({out}), nn.ReLU6())",
        f"nn.Sequential(nn.BatchNorm2d({channels}), nn.Conv2d({channels}, {out}, 1))",
        f"nn.ConvTranspose2d({channels}, {out}, {kernel + 1}, stride={stride})",
        f"nn.BatchNorm2d({channels})",
        f"nn.BatchNorm2d({channels}, affine=False)",
        f"nn.GroupNorm(1, {channels})",
        f"nn.InstanceNorm2d({channels})",
        "nn.MaxPool2d(2)",
        "nn.MaxPool2d(3, stride=2, padding=1)",
        "nn.MaxPool2d(2, stride=1, dilation=2)",
        "nn.MaxPool2d(3, 2, ceil_mode=True)",
        "nn.AvgPool2d(2)",
        "nn.AvgPool2d(3, padding=1, count_include_pad=False)",
        "nn.AdaptiveAvgPool2d(1)",
        "nn.AdaptiveAvgPool2d((2, 3))",
        "nn.AdaptiveMaxPool2d(2)",
        "nn.Upsample(scale_factor=2)",
        "nn.Upsample(scale_factor=2, mode='bilinear')",
        "nn.PixelShuffle(2)",
        "nn.PixelUnshuffle(2)",
        "nn.ChannelShuffle(2)",
        f"nn.PReLU({channels})",
        "nn.LocalResponseNorm(3)",
        "nn.ZeroPad2d(1)",
        "nn.Unfold(2)",
        "nn.Dropout2d()",
        "nn.LPPool2d(2, 2)",
        "nn.Softmax2d()",
        f"nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d({channels}, {channels}, 1), nn.Sigmoid())",
    ]


def _volume_modules(random: Random, shape: Shape) -> list[str]:
    channels = shape[1]
    return [
        f"nn.Conv3d({channels}, 4, (1, 3, 3), padding=(0, 1, 1))",
        f"nn.Conv3d({channels}, 4, 2)",
        "nn.MaxPool3d((1, 2, 2))",
        "nn.AvgPool3d((1, 2, 2))",
        f"nn.BatchNorm3d({channels})",
        "nn.AdaptiveAvgPool3d(1)",
        *_vector_modules(random, shape),
    ]


_MODULES: dict[int, Callable[[Random, Shape], list[str]]] = {
    2: _matrix_modules,
    3: _sequence_modules,
    4: _image_modules,
    5: _volume_modules,
}

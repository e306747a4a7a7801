"""Random models as Python source, with their inputs.

A model is drawn one statement at a time. Each statement runs once on real tensors when it is drawn, and is dropped if
torch rejects it, so each model runs in float. `RandomModel.source` is a complete script that defines the model and
reproduces a failure.
"""

from __future__ import annotations

import enum
import itertools
import linecache
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from types import ModuleType
from typing import Any

import torch
from tests.random_statements import Drawn, Table, statement, statement_of_table
from torch import nn

__all__ = ["Form", "Input", "RandomModel", "Sample", "draw_model", "model_of_table"]

Shape = tuple[int, ...]
Sample = tuple[Any, ...] | dict[str, Any]

HEADER = "import torch\nimport torch.nn.functional as F\nfrom torch import nn\n"
MAX_ELEMENTS = 4096
"""A statement with a larger result is dropped, so that random programs are fast."""

INPUT_SHAPES: tuple[Shape, ...] = (
    (1, 4, 8, 8), (1, 3, 9, 7), (2, 4, 6, 6), (1, 6, 12), (2, 5, 8), (1, 8), (3, 16), (4, 8, 8), (7,), (1, 2, 3, 4, 5),
)  # fmt: skip

_numbers = itertools.count()


@dataclass(frozen=True)
class Input:
    """How an input is sampled: normally distributed floats, a mask with some hidden positions, or a fixed value."""

    shape: Shape
    kind: str = "float"
    """"float", "bool", "additive" (0 or a large negative number), or "fixed"."""
    value: Any = None
    """The value of a "fixed" input, or the large negative number of an "additive" one."""

    def sample(self, generator: torch.Generator) -> Any:
        """Returns a sample of this input."""
        if self.kind == "fixed":
            return self.value
        if self.kind == "float":
            return torch.randn(self.shape, generator=generator)
        hidden = torch.rand(self.shape, generator=generator) > 0.7
        if hidden.dim():
            hidden[..., :1] = False
        return hidden if self.kind == "bool" else torch.zeros(self.shape).masked_fill(hidden, self.value)


class Form(enum.Enum):
    """The form in which `forward` takes its inputs."""

    POSITIONAL = "positional arguments"
    KEYWORDS = "all but the first by keyword only"
    DICT = "one dict of them all"


@dataclass(frozen=True)
class RandomModel:
    """A model as source."""

    source: str
    inputs: Mapping[str, Input] = field(repr=False)
    form: Form
    statements: int

    def build(self) -> nn.Module:
        """Returns the module in eval mode, with the same random weights in each call."""
        name = f"random_model_{next(_numbers)}"
        file = f"<{name}>"
        linecache.cache[file] = (len(self.source), None, self.source.splitlines(keepends=True), file)
        defined = sys.modules[name] = ModuleType(name)  # a strict export imports the module that defines a class
        exec(compile(self.source, file, "exec"), vars(defined))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module: nn.Module = defined.Net().eval()
            with torch.no_grad():
                _trained_statistics(module)
        return module

    def samples(self, count: int, seed: int) -> list[Sample]:
        """Returns inputs in the form of `forward`: a tuple of its arguments, or a mapping by their names."""
        generator = torch.Generator().manual_seed(seed)
        return [self._sample(generator) for _ in range(count)]

    def _sample(self, generator: torch.Generator) -> Sample:
        values = {name: given.sample(generator) for name, given in self.inputs.items()}
        if self.form is Form.KEYWORDS:
            return values
        return tuple(values.values()) if self.form is Form.POSITIONAL else (values,)


def draw_model(random: Random, *, most_statements: int = 30) -> RandomModel:
    """Draws a model of 3 to `most_statements` statements."""
    while True:
        drawn = _draw(random, random.randint(3, most_statements))
        if drawn is not None:
            return drawn


def model_of_table(text: Table) -> RandomModel | None:
    """Returns a model that computes one entry of the table of statements between others; None if no shape suits it."""
    for seed, shape in enumerate(INPUT_SHAPES * 3):
        random, inputs = Random(seed), {"x": Input(shape), "y": Input(shape)}
        generator = torch.Generator().manual_seed(0)
        state = _State(random, {name: given.sample(generator) for name, given in inputs.items()}, [*inputs])
        state.keep(Drawn(("v0 = F.relu(x * 0.5) + y * 0.25",)), "v0")
        if state.keep(statement_of_table(random, "v1", "v0", state.shapes(), 0, text=text), "v1"):
            state.keep(Drawn(("v2 = torch.tanh(v1)",)), "v2")
            return RandomModel(_source(state, inputs, "(v1, v2)", Form.POSITIONAL), inputs, Form.POSITIONAL, 3)
    return None


def _draw(random: Random, count: int) -> RandomModel | None:
    inputs = _draw_inputs(random)
    generator = torch.Generator().manual_seed(0)
    scope: dict[str, Any] = {name: given.sample(generator) for name, given in inputs.items()}
    state = _State(random, scope, [name for name, given in inputs.items() if given.kind == "float"])
    state.masks = [name for name, given in inputs.items() if given.kind in ("bool", "additive")]
    for _ in range(4 * count):
        if state.accepted >= count:
            break
        state.try_statement()
    if state.accepted < 3:
        return None
    returned = _draw_outputs(random, state)
    if returned is None:
        return None
    form = random.choices(list(Form), [6, 1, 1])[0]
    model = RandomModel(_source(state, inputs, returned, form), inputs, form, state.accepted)
    return model if _runs_at_once(model) else None


def _runs_at_once(model: RandomModel) -> bool:
    """Whether the whole model runs. Drawing copied values between statements, which changed their strides."""
    (sample,) = model.samples(1, 0)
    try:
        with torch.no_grad():
            model.build()(**sample) if isinstance(sample, dict) else model.build()(*sample)
    except RuntimeError:
        return False
    return True


class _State:
    """The statements and values that were drawn so far."""

    def __init__(self, random: Random, scope: dict[str, Any], values: list[str]) -> None:
        self.random = random
        self.values = values
        self.masks: list[str] = []
        self.parts: list[str] = []
        self.lines: list[str] = []
        self.accepted = 0
        self.holder = nn.Module().eval()
        self.scope = {"torch": torch, "nn": nn, "F": torch.nn.functional, "self": self.holder, **scope}

    def try_statement(self) -> None:
        name = f"v{len(self.lines)}"
        chosen = self.random.choice(self.values[-4:] if self.random.random() < 0.7 else self.values)
        self.keep(statement(self.random, name, chosen, self.shapes(), len(self.parts)), name)

    def keep(self, drawn: Drawn, name: str) -> bool:
        """Adds the statement that computes `name` if torch runs it; returns whether it does."""
        if not self._runs(drawn, name):
            return False
        self.lines += drawn.lines
        self.parts += drawn.parts
        self.values.append(name)
        self.accepted += 1
        return True

    def shapes(self) -> dict[str, Shape]:
        return {name: tuple(self.scope[name].shape) for name in (*self.values, *self.masks)}

    def _runs(self, drawn: Drawn, name: str) -> bool:
        """Runs the statement, and keeps its effects if it succeeds."""
        before = {key: value.clone() for key, value in self.scope.items() if isinstance(value, torch.Tensor)}
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            try:
                exec("\n".join(drawn.parts), self.scope)
                self.holder.eval()
                exec("\n".join(drawn.lines), self.scope)
            except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
                self._undo(before)
                return False
        value = self.scope[name]
        good = isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.numel() <= MAX_ELEMENTS
        if good and value.dim() <= 5 and bool(value.isfinite().all()) and float(value.abs().sum()) < 1e5 * MAX_ELEMENTS:
            return True
        self._undo(before)
        del self.scope[name]
        return False

    def _undo(self, before: Mapping[str, torch.Tensor]) -> None:
        self.scope.update(before)
        part = f"m{len(self.parts)}"  # the name of the dropped statement; the next one uses it
        if hasattr(self.holder, part):
            delattr(self.holder, part)


def _draw_inputs(random: Random) -> dict[str, Input]:
    shape = random.choice(INPUT_SHAPES)
    inputs = {"x": Input(shape)}
    kind = random.random()
    if kind < 0.2:
        inputs["y"] = Input(shape)
    elif kind < 0.3:
        inputs["y"] = Input(tuple(1 if random.random() < 0.5 else size for size in shape))
    elif kind < 0.4:
        inputs["mask"] = Input(shape if random.random() < 0.5 else shape[-1:], "bool")
    elif kind < 0.5:
        fill = random.choice([-1e4, -1e9, torch.finfo(torch.float32).min])
        inputs["mask"] = Input(shape if random.random() < 0.5 else shape[-1:], "additive", fill)
    if random.random() < 0.1:
        inputs["option"] = Input((), "fixed", random.choice([None, True, 2, 0.5, "mean"]))
    return inputs


def _draw_outputs(random: Random, state: _State) -> str | None:
    """Draws the expression that `forward` returns."""
    last = state.values[-1]
    form = random.random()
    if form < 0.5:
        return last
    others = [random.choice(state.values) for _ in range(random.randint(1, 2))]
    values = [last, *others]
    if form < 0.7:
        return f"({', '.join(values)})"
    if form < 0.8:
        return "{" + ", ".join(f"'out{i}': {value}" for i, value in enumerate(values)) + "}"
    if form < 0.85:
        return f"[{values[0]}, ({values[1]}, None)]"
    if form < 0.9:
        return f"({values[0]}, {{'loss': None, 'again': {values[0]}}})"
    if form < 0.94:
        return f"({values[0]}, {state.values[0]}, 3)"
    return f"({values[0]}, {values[1]}.argmax(-1))" if state.shapes()[values[1]] else last


def _source(state: _State, inputs: Mapping[str, Input], returned: str, form: Form) -> str:
    parts = state.parts or ["pass"]
    names = list(inputs)
    if form is Form.KEYWORDS and len(names) > 1:
        names.insert(1, "*")
    arguments = "given" if form is Form.DICT else ", ".join(names)
    unpacked = [f"{name} = given['{name}']" for name in inputs] if form is Form.DICT else []
    body = [
        "class Net(nn.Module):",
        "    def __init__(self):",
        "        super().__init__()",
        *(f"        {part}" for part in parts),
        "",
        f"    def forward(self, {arguments}):",
        *(f"        {line}" for line in (*unpacked, *state.lines)),
        f"        return {returned}",
    ]
    return HEADER + "\n" + "\n".join(body) + "\n"


def _trained_statistics(module: nn.Module) -> None:
    """Draws statistics and affine weights as after a training, far from 0 and 1."""
    for part in module.modules():
        mean, variance = getattr(part, "running_mean", None), getattr(part, "running_var", None)
        if mean is not None and variance is not None:
            mean.normal_()
            variance.uniform_(0.5, 2)

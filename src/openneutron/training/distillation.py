"""Trains towards the outputs of the float model. The final held-out loss is never larger than the first one.

The rates are in int8 steps, so that one rate suits networks of any scale. The loss on held-out samples is measured
several times. If it has increased by more than 1 dB, the best parameters are restored, and the rate is halved.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from openneutron.errors import ModelError
from openneutron.training.fake_quantize import FakeQuantizedWeight, RangeFactors

__all__ = ["Distillation", "parameter_groups", "train_towards"]

Samples = Sequence[tuple[Any, ...]]
Outputs = Callable[[tuple[Any, ...]], object]
"""A function from the leaves of the arguments to the outputs."""

CHECKS = 16
# A loss above this multiple of the least one is taken back: 1 dB. Smaller increases are often by chance, or vanish when
# the rate decreases.
MUCH_WORSE = 1.25
HELD_OUT_SHARE, MOST_HELD_OUT = 8, 64
# Gradients are clipped to this multiple of the mean of earlier norms. Gradients through many steps have rare peaks.
MOST_GRADIENT, MEMORY = 2.0, 0.9
CODES = 127


@dataclass(frozen=True)
class Distillation:
    """The result of a training.

    `steps` is the number of updates. `sqnr_before_db` and `sqnr_after_db` are the signal-to-noise ratios of the outputs
    on held-out samples, against the outputs of the float model.
    """

    steps: int
    sqnr_before_db: float
    sqnr_after_db: float


def parameter_groups(module: nn.Module, rate: float) -> list[dict[str, object]]:
    """Returns groups of all parameters for an optimizer such as Adam, whose updates are about as large as the rate.

    `rate` is in int8 steps. The rate of a weight is `rate` times its scale, a bias has the mean rate of all weights,
    and the factor of an activation's range moves the highest code by `rate` steps.
    """
    groups: list[dict[str, object]] = []
    taken: set[int] = set()
    rates = []
    for part in module.modules():
        if isinstance(part, FakeQuantizedWeight):
            assert isinstance(part.scale, Tensor)
            rates.append(rate * float(part.scale.mean()))
            groups.append({"params": [part.value], "lr": rates[-1]})
            taken.add(id(part.value))
        elif isinstance(part, RangeFactors):
            groups.append({"params": [part.logarithms], "lr": rate / CODES})
            taken.add(id(part.logarithms))
    others = [parameter for parameter in module.parameters() if id(parameter) not in taken]
    if others:
        groups.append({"params": others, "lr": sum(rates) / len(rates) if rates else rate / CODES})
    return groups


@dataclass
class _Kept:
    """The parameters with the least loss so far."""

    module: nn.Module
    loss: float
    parameters: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._keep()

    def _keep(self) -> None:
        self.parameters = copy.deepcopy(self.module.state_dict())

    def takes(self, loss: float) -> bool:
        """Keeps the current parameters if `loss` is the least so far; returns whether it is."""
        is_best = loss < self.loss
        if is_best:
            self.loss = loss
            self._keep()
        return is_best

    def restore(self) -> None:
        """Writes the kept parameters to the module."""
        self.module.load_state_dict(self.parameters)


@dataclass
class _Clipping:
    """Limits the norm of gradients to a multiple of the mean of earlier norms."""

    mean: float = 0.0

    def clip(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Clips the gradients in place. Returns whether all of them are finite."""
        most = MOST_GRADIENT * self.mean if self.mean else math.inf
        norm = float(nn.utils.clip_grad_norm_(parameters, most))
        if not math.isfinite(norm):
            return False
        self.mean = MEMORY * self.mean + (1 - MEMORY) * min(norm, most) if self.mean else norm
        return True


def train_towards(
    teacher: Outputs,
    student: Outputs,
    module: nn.Module,
    samples: Samples,
    *,
    seconds: float,
    steps: int | None,
    rate: float,
    batch: int,
) -> Distillation:
    """Trains the parameters of `module`, which `student` uses, towards the outputs of `teacher`.

    `teacher` takes one sample, and `student` takes several, stacked in a new first dimension of each tensor. The loss
    is the mean over the outputs of noise energy / signal energy. Every eighth sample, up to 64, is held out. The rate
    decreases to 0 by a half cosine over `seconds`, or over `steps` if these are fewer. At each of `CHECKS` times, the
    loss of held-out samples is measured; if it is more than `MUCH_WORSE` times the least so far, training continues
    from the parameters with the least loss and with half the rate. Ends with the parameters of the least loss.

    Raises `ModelError` if no output of floating point depends on trained parameters, or if the outputs of `teacher` and
    `student` differ in number or shape.
    """
    count = min(max(len(samples) // HELD_OUT_SHARE, 1), MOST_HELD_OUT)
    stride = len(samples) // count
    held_out = [index for index in range(len(samples)) if index % stride == 0][:count]
    trained = sorted(set(range(len(samples))) - set(held_out))
    with torch.no_grad():
        wanted = [_floats(teacher(sample)) for sample in samples]
    with torch.enable_grad():  # the caller may have disabled it
        _check_outputs(_floats(student(_stacked(samples, [0]))), wanted[0])

    def loss_of(chosen: Sequence[int]) -> Tensor:
        found = _floats(student(_stacked(samples, chosen)))
        pairs = zip(
            found,
            (torch.stack([wanted[index][number] for index in chosen]) for number in range(len(found))),
            strict=True,
        )
        return sum((_noise_ratio(*pair) for pair in pairs), torch.zeros(())) / len(found)

    def held_out_loss() -> float:
        with torch.no_grad():
            parts = [held_out[start : start + batch] for start in range(0, count, batch)]
            return sum(float(loss_of(part)) * len(part) for part in parts) / count

    before = held_out_loss()
    kept, clipping = _Kept(module, before), _Clipping()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(parameter_groups(module, rate))
    rates, begun, step, checks, share = (
        [group["lr"] for group in optimizer.param_groups],
        time.perf_counter(),
        0,
        0,
        1.0,
    )
    most_steps = math.inf if steps is None else steps
    with torch.enable_grad():
        while trained and (done := max((time.perf_counter() - begun) / seconds, step / most_steps)) < 1:
            for group, group_rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = group_rate * share * (1 + math.cos(math.pi * done)) / 2
            chosen = torch.randint(len(trained), (min(batch, len(trained)),), generator=generator).tolist()
            optimizer.zero_grad()
            torch.autograd.backward(loss_of([trained[index] for index in chosen]))
            if clipping.clip(module.parameters()):
                optimizer.step()
            step += 1
            if done * CHECKS >= checks + 1:
                checks += 1
                if not kept.takes(loss := held_out_loss()) and not loss <= MUCH_WORSE * kept.loss:
                    kept.restore()
                    share, clipping = share / 2, _Clipping()
                    optimizer.state.clear()
    kept.takes(held_out_loss())
    kept.restore()
    return Distillation(step, _decibels(before), _decibels(kept.loss))


def _check_outputs(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Compares the outputs of one sample: `found` of the student, [1, ...], and `wanted` of the teacher, [...]."""
    if not any(value.requires_grad for value in found):
        raise ModelError(
            "No output of floating point depends on trained weights, so there is nothing to train towards. Return the "
            "scores of the model, and take the argmax outside of it."
        )
    shapes, teacher_shapes = [list(value.shape[1:]) for value in found], [list(value.shape) for value in wanted]
    if shapes != teacher_shapes:
        raise ModelError(
            f"The outputs of the module have the shapes {shapes}, and those of the float model {teacher_shapes}. Give "
            "the float model that was quantized."
        )


def _stacked(samples: Samples, chosen: Sequence[int]) -> tuple[Any, ...]:
    columns = zip(*(samples[index] for index in chosen), strict=True)
    return tuple(torch.stack(column) if isinstance(column[0], Tensor) else column[0] for column in columns)


def _floats(outputs: object) -> list[Tensor]:
    return [value for value in tree_leaves(outputs) if isinstance(value, Tensor) and value.is_floating_point()]


def _noise_ratio(found: Tensor, wanted: Tensor) -> Tensor:
    ratio: Tensor = (found - wanted).square().sum() / wanted.square().sum().clamp(min=torch.finfo(wanted.dtype).tiny)
    return ratio


def _decibels(ratio: float) -> float:
    return math.inf if ratio == 0 else -10 * math.log10(ratio)

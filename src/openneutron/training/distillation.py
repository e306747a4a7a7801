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

from openneutron.core.numbers import decibels
from openneutron.errors import ModelError
from openneutron.training.fake_quantize import FakeQuantizedWeight, RangeFactors

__all__ = [
    "ComparedValues", "Distillation", "KeptValues", "Samples", "held_out_of", "others_than", "parameter_groups",
    "stacked", "train_towards",
]  # fmt: skip

Samples = Sequence[tuple[Any, ...]]
CHECKS = 16
# The rate begins with a share of FIRST_RATE, and increases to 1 over a share of WARM_UP of the training. Adam's first
# updates change each parameter by the rate, whatever its gradient is, so a full rate would undo much of the recovery.
FIRST_RATE, WARM_UP = 0.05, 0.2
# A loss above this multiple of the least one is taken back: 6 dB. Training first undoes a part of the recovery, because
# the first updates change the rounding of weights that compensate each other. The loss of recurrent networks increases
# by up to 4 dB before it decreases below that of the start.
MUCH_WORSE = 4.0
HELD_OUT_EVERY, MOST_HELD_OUT = 8, 64
# Gradients are clipped to this multiple of the mean of earlier norms. Gradients through many steps have rare peaks.
MOST_GRADIENT, MEMORY = 2.0, 0.9
CODES = 127
# Samples beyond these SQNRs in dB, such as one whose outputs are exact, count as one at the limit.
SQNR_LIMITS = -20.0, 60.0
# Limit in bytes of the values of the float model that training keeps.
MOST_KEPT = 1 << 29


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

    `rate` is in int8 steps. The rate of a weight is `rate` times its scale, or times the largest scale of its channels,
    so that weights per channel move as far as weights per tensor. A bias has the mean rate of all weights, and the
    factor of an activation's range moves the highest code by `rate` steps.
    """
    groups: list[dict[str, object]] = []
    taken: set[int] = set()
    rates = []
    for part in module.modules():
        if isinstance(part, FakeQuantizedWeight):
            assert isinstance(part.scale, Tensor)
            rates.append(rate * float(part.scale.max()))
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


@dataclass(frozen=True)
class ComparedValues:
    """The values of the float model and of the trained module that the loss compares.

    `wanted` returns the values of the float model for the samples with the given indices. `found` returns the values of
    the trained module for arguments whose tensors have the samples as their first dimension. Both return the same list:
    first the floating-point outputs, whose number is `outputs`, then values inside the model. The first dimension of
    each value is that of the samples.
    """

    wanted: Callable[[Sequence[int]], list[Tensor]]
    found: Callable[[tuple[Any, ...]], list[Tensor]]
    outputs: int
    samples: Samples
    held_out: Sequence[int] | None = None
    """The indices of the samples that measure the training and are not used in it; None for `held_out_of` all."""

    def check_outputs(self) -> None:
        """Compares the outputs for the first sample.

        Raises `ModelError` if the module and the float model differ in the number or the shapes of outputs, or if no
        output depends on trained parameters.
        """
        with torch.enable_grad():  # the caller may have disabled it
            found, wanted = self._values([0])
        shapes, float_shapes = ([list(value.shape[1:]) for value in values] for values in (found, wanted))
        if shapes != float_shapes:
            raise ModelError(
                f"The outputs of the module have the shapes {shapes}, and those of the float model {float_shapes}. "
                "Give the float model that was quantized."
            )
        if not any(value.requires_grad for value in found[: self.outputs]):
            raise ModelError(
                "No output of floating point depends on trained weights, so there is nothing to train towards. Return "
                "the scores of the model, and take the argmax outside of it."
            )

    def has_gradient(self) -> bool:
        """Returns whether the loss depends on trained parameters. Computes it for the first sample."""
        with torch.enable_grad():  # the caller may have disabled it
            return self.loss([0]).requires_grad

    def loss(self, chosen: Sequence[int]) -> Tensor:
        """Returns the mean over all values of noise energy / signal energy, for one batch of samples."""
        return _mean_noise_ratio(*self._values(chosen))

    @torch.no_grad()
    def loss_of_outputs(self, chosen: Sequence[int], batch: int) -> float:
        """Returns the mean over the outputs of noise energy / signal energy, or over all values if none is an output.

        The samples are computed in batches of at most `batch`, whose losses are averaged.
        """
        count, total = self.outputs or None, 0.0
        for start in range(0, len(chosen), batch):
            part = chosen[start : start + batch]
            found, wanted = self._values(part)
            total += float(_mean_noise_ratio(found[:count], wanted[:count])) * len(part)
        return total / len(chosen)

    @torch.no_grad()
    def mean_sqnr(self, chosen: Sequence[int], batch: int) -> float:
        """Returns the mean over samples of the SQNR of their outputs, limited to `SQNR_LIMITS`, in dB.

        A sample with a large error has less weight in this mean than in `loss_of_outputs`. Samples whose outputs in
        float are zeros have no weight; the mean is 0 if all are such samples. The samples are computed in batches.
        """
        count, found_db = self.outputs or None, list[float]()
        for start in range(0, len(chosen), batch):
            part = chosen[start : start + batch]
            found, wanted = self._values(part)
            for place in range(len(part)):
                pairs = [(one[place], other[place]) for one, other in zip(found[:count], wanted[:count], strict=True)]
                ratios = [float(_noise_ratio(*pair)) for pair in pairs if pair[1].any()]
                if ratios:
                    found_db.append(_limited(decibels(sum(ratios) / len(ratios))))
        return sum(found_db) / max(len(found_db), 1)

    def _values(self, chosen: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the values of the trained module and those of the float model."""
        with torch.no_grad():
            wanted = self.wanted(chosen)
        return self.found(stacked(self.samples, chosen)), wanted


class KeptValues:
    """Computes values for samples, and keeps those of each sample as long as all of them are within `MOST_KEPT`.

    `compute` returns values for the samples with the given indices, whose first dimension is that of the samples.
    """

    def __init__(self, compute: Callable[[Sequence[int]], list[Tensor]]) -> None:
        self._compute = compute
        self._kept: dict[int, list[Tensor]] = {}
        self._bytes = 0

    def __call__(self, chosen: Sequence[int]) -> list[Tensor]:
        """Returns the values for the samples with these indices, as `compute` does."""
        found = {index: self._kept[index] for index in chosen if index in self._kept}
        if missing := [index for index in dict.fromkeys(chosen) if index not in found]:
            computed = self._compute(missing)
            found.update((index, [value[place] for value in computed]) for place, index in enumerate(missing))
        for index in missing:
            self._keep(index, found[index])
        return [torch.stack(each) for each in zip(*(found[index] for index in chosen), strict=True)]

    def _keep(self, index: int, values: list[Tensor]) -> None:
        size = sum(value.numel() * value.element_size() for value in values)
        if self._bytes + size <= MOST_KEPT:
            self._kept[index] = [value.clone() for value in values]  # not views, which would keep the whole batch
            self._bytes += size


class _Updates:
    """Updates the parameters of a module with Adam, by rates that change over the training."""

    def __init__(self, module: nn.Module, rate: float) -> None:
        self.module = module
        self.optimizer = torch.optim.Adam(parameter_groups(module, rate))
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.share, self.clipping = 1.0, _Clipping()

    def step(self, loss: Tensor, done: float) -> None:
        """Updates the parameters once. `done` is the share of the training that is over, 0 to 1."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.share * _share_of_rate(done)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        if self.clipping.clip(self.module.parameters()):
            self.optimizer.step()

    def halve_rates(self) -> None:
        """Halves all rates from now on, and forgets the moments and the norms of earlier gradients."""
        self.share, self.clipping = self.share / 2, _Clipping()
        self.optimizer.state.clear()


def _share_of_rate(done: float) -> float:
    """Returns the share of the rate when a share of `done` of the training is over."""
    return min(1, FIRST_RATE + done / WARM_UP) * (1 + math.cos(math.pi * done)) / 2


def train_towards(
    module: nn.Module,
    comparison: ComparedValues,
    *,
    seconds: float,
    steps: int | None,
    rate: float,
    batch: int,
    selects: bool = True,
    after_step: Callable[[], None] = lambda: None,
) -> Distillation:
    """Trains the parameters of `module` towards the values of the float model in `comparison`.

    Updates use no held-out sample of `comparison`. The rate increases in the first fifth of the training, and decreases
    to 0 by a half cosine over `seconds`, or over `steps` if these are fewer. At each of `CHECKS` times, the loss of the
    outputs of held-out samples is measured; if it is more than `MUCH_WORSE` times the least so far, training continues
    from the parameters with the least loss and with half the rate. Ends with the parameters of the least loss; without
    `selects`, with the current ones. Calls `after_step` after each update.
    """
    count = len(comparison.samples)
    held_out = held_out_of(count) if comparison.held_out is None else comparison.held_out
    trained = others_than(held_out, count)
    before = comparison.loss_of_outputs(held_out, batch)
    kept, updates = _Kept(module, before), _Updates(module, rate)
    generator = torch.Generator().manual_seed(0)
    most_steps = math.inf if steps is None else steps
    begun, step, checks = time.perf_counter(), 0, 0
    with torch.enable_grad():
        while trained and (done := max((time.perf_counter() - begun) / seconds, step / most_steps)) < 1:
            chosen = torch.randint(len(trained), (min(batch, len(trained)),), generator=generator).tolist()
            updates.step(comparison.loss([trained[index] for index in chosen]), done)
            step += 1
            after_step()
            if done * CHECKS >= checks + 1:
                checks += 1
                loss = comparison.loss_of_outputs(held_out, batch)
                if not kept.takes(loss) and not loss <= MUCH_WORSE * kept.loss:
                    kept.restore()
                    updates.halve_rates()
    last = comparison.loss_of_outputs(held_out, batch)
    if selects and not kept.takes(last):
        kept.restore()
    return Distillation(step, decibels(before), decibels(kept.loss if selects else last))


def _limited(sqnr_db: float) -> float:
    """Returns a number within `SQNR_LIMITS`, or NaN."""
    lowest, highest = SQNR_LIMITS
    return sqnr_db if math.isnan(sqnr_db) else min(max(sqnr_db, lowest), highest)


def held_out_of(count: int, every: int = HELD_OUT_EVERY) -> list[int]:
    """Returns the indices of the held-out samples among `count`: one of `every`, at most 64, evenly spaced."""
    held = min(max(count // every, 1), MOST_HELD_OUT)
    return list(range(0, count, count // held))[:held]


def others_than(held_out: Sequence[int], count: int) -> list[int]:
    """Returns the indices below `count` that are not in `held_out`, in order."""
    return sorted(set(range(count)) - set(held_out))


def stacked(samples: Samples, chosen: Sequence[int]) -> tuple[Any, ...]:
    """Returns the arguments of the samples with these indices, stacked in a new first dimension of each tensor."""
    columns = zip(*(samples[index] for index in chosen), strict=True)
    return tuple(torch.stack(column) if isinstance(column[0], Tensor) else column[0] for column in columns)


def _mean_noise_ratio(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    ratios = [_noise_ratio(*pair) for pair in zip(found, wanted, strict=True)]
    return sum(ratios, torch.zeros(())) / len(ratios)


def _noise_ratio(found: Tensor, wanted: Tensor) -> Tensor:
    ratio: Tensor = (found - wanted).square().sum() / wanted.square().sum().clamp(min=torch.finfo(wanted.dtype).tiny)
    return ratio

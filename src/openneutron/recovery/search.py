"""Which recipe is best for a network: the one whose outputs are nearest to float on inputs that it has not seen.

No rule for ranges, and no method, is best for all networks, and the error of one layer says little of what it does to
the outputs. So whole recipes are tried, one choice after the other, each time keeping the best (coordinate descent).
Of recipes that differ by no more than chance, the first stays.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from openneutron.calibration import CalibrationOptions
from openneutron.core.progress import bar
from openneutron.errors import CalibrationError, OptionError
from openneutron.model.state import run_sample
from openneutron.quantizer import NeutronQuantizer
from openneutron.recovery.recipes import AUTO, ENOUGH_SAMPLES, Recipe, quantized_by
from openneutron.recovery.walk import Samples

__all__ = ["FEWEST_SAMPLES", "Freedom", "Trial", "check_seconds", "descend", "held_out", "sqnr_db", "try_recipes"]

_LOGGER = logging.getLogger(__name__)

# Every so many samples, one is held out.
STRIDE = 5
FEWEST_SAMPLES = ENOUGH_SAMPLES * STRIDE // (STRIDE - 1)
# A recipe takes the place of another when it is ahead by so many standard errors of the difference.
STANDARD_ERRORS = 2.0
# What the SQNR of an output that is exact counts as, in dB.
HIGHEST_SQNR = 120.0


@dataclass(frozen=True)
class Trial:
    """A recipe that was tried, and how near it comes to float on each input held out: [inputs] SQNR in dB."""

    recipe: Recipe
    sqnrs_db: tuple[float, ...]
    seconds: float

    @property
    def sqnr_db(self) -> float:
        """The mean over the inputs."""
        return statistics.fmean(self.sqnrs_db)

    def is_better_than(self, other: Trial) -> bool:
        """Whether its mean is higher by more than chance would make it, with the same inputs for both."""
        gains = [own - theirs for own, theirs in zip(self.sqnrs_db, other.sqnrs_db, strict=True)]
        return statistics.fmean(gains) > STANDARD_ERRORS * statistics.stdev(gains) / math.sqrt(len(gains))


@dataclass(frozen=True)
class Freedom:
    """What recipes may choose: whether channels are equalized, and how ranges are found."""

    equalizes: bool = True
    ranges: bool = True

    @property
    def start(self) -> Recipe:
        """The recipe that the search begins with."""
        return replace(AUTO, equalizes=self.equalizes, range_by=AUTO.range_by if self.ranges else None)

    @property
    def choices(self) -> dict[str, Sequence[Any]]:
        """What else the fields of `start` could be, in the order in which that is tried."""
        return {
            "mends": ("biases", None),
            "range_by": ("relative", "extremes", "percentile") if self.ranges else (),  # "entropy" clips far too much
            "trusts_samples": (False,),
            "equalizes": (False,) if self.equalizes else (),
        }


def try_recipes(
    exported: GraphModule,
    quantizer: NeutronQuantizer,
    samples: Samples,
    running: CalibrationOptions,
    *,
    free: Freedom,
    seconds: float,
) -> tuple[Recipe, list[Trial]]:
    """The best recipe, and all that were tried; of `seconds`, the time of one is left for what follows.

    `exported` is as for `quantized_by`; it says what float yields. Raises `CalibrationError` for fewer than
    `FEWEST_SAMPLES` samples.
    """
    if len(samples) < FEWEST_SAMPLES:
        raise CalibrationError(
            f'recover="best" holds out every {STRIDE}th calibration input to judge by, and needs {FEWEST_SAMPLES} or '
            f'more; there are {len(samples)}. Give more, or use recover="auto".'
        )
    seen, unseen = held_out(samples)
    quiet = replace(running, progress=False)

    with bar("Trying recipes", 1 + sum(map(len, free.choices.values())), running.progress) as advance:

        def tried(recipe: Recipe) -> Trial:
            start = time.perf_counter()
            converted, _ = quantized_by(recipe, exported, quantizer, seen, quiet)
            found = tuple(sqnr_db(exported, converted, sample) for sample in unseen)
            trial = Trial(recipe, found, time.perf_counter() - start)
            _LOGGER.info("%.1f dB in %.0f s: %s", trial.sqnr_db, trial.seconds, recipe)
            advance(1)
            return trial

        return descend(free.start, free.choices, tried, time.perf_counter() + seconds)


def check_seconds(seconds: float) -> None:
    """Raise `OptionError` for what is no time."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
        raise OptionError(f"recovery_seconds is a number above 0, not {seconds!r}.")


def held_out(samples: Samples) -> tuple[Samples, Samples]:
    """Those to calibrate with, and those to judge by, which are spread over all."""
    unseen = samples[STRIDE - 1 :: STRIDE]
    return [sample for index, sample in enumerate(samples) if index % STRIDE != STRIDE - 1], unseen


def descend(
    start: Recipe, choices: Mapping[str, Sequence[Any]], tried: Callable[[Recipe], Trial], deadline: float
) -> tuple[Recipe, list[Trial]]:
    """Try `start`, then for each field its `choices`, with all others as in the best so far: the best, and all trials.

    Ends early when two more of the longest trial would not be over by `deadline` (of `time.perf_counter`).
    """
    best = tried(start)
    trials = [best]
    for name, values in choices.items():
        base = best.recipe
        for value in values:
            if time.perf_counter() + 2 * max(trial.seconds for trial in trials) > deadline:
                _LOGGER.warning("No time is left to try %s=%r, and what comes after it.", name, value)
                return best.recipe, trials
            trials.append(tried(replace(base, **{name: value})))
            best = trials[-1] if trials[-1].is_better_than(best) else best
    return best.recipe, trials


@torch.no_grad()
def sqnr_db(reference: GraphModule, converted: GraphModule, sample: tuple[torch.Tensor, ...]) -> float:
    """10 log10(signal / noise) in dB for one input, of the mean noise / signal of all float outputs."""
    outputs = (tree_leaves(run_sample(module, sample)) for module in (reference, converted))
    pairs = zip(*outputs, strict=True)
    ratios = [_noise(wanted, found) for wanted, found in pairs if _is_float(wanted)]
    noise = statistics.fmean(ratios) if ratios else 0.0
    return min(HIGHEST_SQNR, -10 * math.log10(noise)) if noise else HIGHEST_SQNR


def _is_float(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _noise(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """As a share of the signal; without any, as it is."""
    signal = wanted.double()
    return float((found.double() - signal).square().sum()) / (float(signal.square().sum()) or 1.0)

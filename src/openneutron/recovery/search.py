"""Searches for the best recipe of a network: the one whose outputs are nearest to float on held-out inputs.

No rule for ranges and no method is best for all networks, and the error of a single layer hardly predicts the error of
the outputs. The search therefore quantizes the network with whole recipes. It varies one field after the other and
keeps the best value (coordinate descent). A recipe replaces the best one only if it is significantly better.
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
from openneutron.core.progress import progress_bar
from openneutron.errors import CalibrationError, OptionError
from openneutron.model.state import run_sample
from openneutron.quantizer import Int8Quantizer
from openneutron.recovery.layerwise import Samples
from openneutron.recovery.recipes import AUTO, ENOUGH_SAMPLES, Recipe, quantize_by_recipe

__all__ = [
    "FEWEST_SAMPLES",
    "SearchSpace",
    "Trial",
    "check_seconds",
    "coordinate_descent",
    "split_held_out",
    "sqnr_db",
    "try_recipes",
]

_LOGGER = logging.getLogger(__name__)

# One of STRIDE samples is held out.
STRIDE = 5
FEWEST_SAMPLES = ENOUGH_SAMPLES * STRIDE // (STRIDE - 1)
# A recipe is better than another if its mean gain exceeds this many standard errors.
STANDARD_ERRORS = 2.0
# Upper limit of an SQNR in dB, which is also the SQNR of an exact output.
HIGHEST_SQNR = 120.0


@dataclass(frozen=True)
class Trial:
    """A recipe that was tried, the SQNR in dB of the outputs for each held-out input, and the seconds of the trial."""

    recipe: Recipe
    sqnrs_db: tuple[float, ...]
    seconds: float

    @property
    def sqnr_db(self) -> float:
        """Mean SQNR over the inputs, in dB."""
        return statistics.fmean(self.sqnrs_db)

    def is_better_than(self, other: Trial) -> bool:
        """Whether the mean gain over `other`, on the same inputs, exceeds `STANDARD_ERRORS` standard errors."""
        gains = [own - theirs for own, theirs in zip(self.sqnrs_db, other.sqnrs_db, strict=True)]
        return statistics.fmean(gains) > STANDARD_ERRORS * statistics.stdev(gains) / math.sqrt(len(gains))


@dataclass(frozen=True)
class SearchSpace:
    """The fields of a recipe that the search may vary: equalization of channels, and the rule for ranges."""

    equalizes: bool = True
    ranges: bool = True

    @property
    def start(self) -> Recipe:
        """The first recipe that the search tries."""
        return replace(AUTO, equalizes=self.equalizes, range_by=AUTO.range_by if self.ranges else None)

    @property
    def choices(self) -> dict[str, Sequence[Any]]:
        """Other values for the fields of `start`, in the order in which the search tries them."""
        return {
            "correction": ("biases", None),
            "range_by": ("relative", "minmax", "percentile") if self.ranges else (),  # "kl" clips too much
            "trusts_samples": (False,),
            "equalizes": (False,) if self.equalizes else (),
        }


def try_recipes(
    exported: GraphModule,
    quantizer: Int8Quantizer,
    samples: Samples,
    running: CalibrationOptions,
    *,
    space: SearchSpace,
    seconds: float,
) -> tuple[Recipe, list[Trial]]:
    """Returns the best recipe and all trials. Leaves time for the final quantization within `seconds`.

    `exported` is the float graph, as for `quantize_by_recipe`. Raises `CalibrationError` for fewer than
    `FEWEST_SAMPLES` samples.
    """
    if len(samples) < FEWEST_SAMPLES:
        raise CalibrationError(
            f'recover="best" holds out every {STRIDE}th calibration input to compare recipes, and needs at least '
            f'{FEWEST_SAMPLES} inputs; there are {len(samples)}. Give more, or use recover="auto".'
        )
    seen, unseen = split_held_out(samples)
    quiet = replace(running, progress=False)

    with progress_bar("Trying recipes", 1 + sum(map(len, space.choices.values())), running.progress) as advance:

        def tried(recipe: Recipe) -> Trial:
            start = time.perf_counter()
            converted, _ = quantize_by_recipe(recipe, exported, quantizer, seen, quiet)
            found = tuple(sqnr_db(exported, converted, sample) for sample in unseen)
            trial = Trial(recipe, found, time.perf_counter() - start)
            _LOGGER.info("%.1f dB in %.0f s: %s", trial.sqnr_db, trial.seconds, recipe)
            advance(1)
            return trial

        return coordinate_descent(space.start, space.choices, tried, time.perf_counter() + seconds)


def check_seconds(seconds: float) -> None:
    """Raises `OptionError` unless `seconds` is a positive number."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
        raise OptionError(f"recovery_seconds must be a number above 0, not {seconds!r}.")


def split_held_out(samples: Samples) -> tuple[Samples, Samples]:
    """Splits samples into those for calibration and those held out, which are evenly spread over all samples."""
    unseen = samples[STRIDE - 1 :: STRIDE]
    return [sample for index, sample in enumerate(samples) if index % STRIDE != STRIDE - 1], unseen


def coordinate_descent(
    start: Recipe, choices: Mapping[str, Sequence[Any]], tried: Callable[[Recipe], Trial], deadline: float
) -> tuple[Recipe, list[Trial]]:
    """Tries `start`, and then the `choices` of each field, with the other fields of the best recipe so far.

    Returns the best recipe and all trials. Stops if twice the time of the longest trial would exceed `deadline`, a time
    of `time.perf_counter`.
    """
    best = tried(start)
    trials = [best]
    for name, values in choices.items():
        base = best.recipe
        for value in values:
            if time.perf_counter() + 2 * max(trial.seconds for trial in trials) > deadline:
                _LOGGER.warning(
                    "The time limit is reached. Recipes with %s=%r and later ones are not tried.", name, value
                )
                return best.recipe, trials
            trials.append(tried(replace(base, **{name: value})))
            best = trials[-1] if trials[-1].is_better_than(best) else best
    return best.recipe, trials


@torch.no_grad()
def sqnr_db(reference: GraphModule, converted: GraphModule, sample: tuple[torch.Tensor, ...]) -> float:
    """Returns the SQNR for one sample in dB: -10 log10 of the mean noise / signal ratio of all float outputs."""
    outputs = (tree_leaves(run_sample(module, sample)) for module in (reference, converted))
    pairs = zip(*outputs, strict=True)
    ratios = [_noise_to_signal(wanted, found) for wanted, found in pairs if _is_float(wanted)]
    noise = statistics.fmean(ratios) if ratios else 0.0
    return min(HIGHEST_SQNR, -10 * math.log10(noise)) if noise else HIGHEST_SQNR


def _is_float(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _noise_to_signal(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Returns the noise energy / signal energy; the noise energy itself if there is no signal."""
    signal = wanted.double()
    return float((found.double() - signal).square().sum()) / (float(signal.square().sum()) or 1.0)

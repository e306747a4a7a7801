"""Shows the observers of a prepared model its calibration data: in batches, and in several processes."""

from __future__ import annotations

import functools
import logging
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter
from torchao.quantization.pt2e.observer import FixedQParamsObserver

from openneutron.calibration.graph import (
    SINGLE,
    Batches,
    bare,
    batches_of,
    in_batches,
    observe_weights,
    why_not_in_batches,
)
from openneutron.core.boundary import typed_errors
from openneutron.core.parallel import check_jobs, in_order, parts
from openneutron.core.progress import bar
from openneutron.errors import CalibrationError, OpenNeutronError, OptionError
from openneutron.model.data import aligned
from openneutron.quantizer.bias_correction import ChannelMeans
from openneutron.quantizer.observers import ObserverOfAnother

__all__ = ["CalibrationOptions", "calibrate"]

_LOGGER = logging.getLogger(__name__)

Inputs = tuple[Any, ...]
State = dict[str, Mapping[str, Tensor]]

# Calibration has converged when no range moves by more than this share of its width over so many samples.
WINDOW = 32
MOVEMENT = 0.01
# Parts of the work for each process: fewer send the model less often, more lose less with a worker.
PARTS_OF_A_JOB = 2


@dataclass(frozen=True)
class CalibrationOptions:
    """How calibration runs. Raises `OptionError` for values that it cannot take.

    `batch_size` samples are run at once; None lets the size of the model decide. `jobs` processes share the samples.
    With `stop_when_converged` it ends when ranges no longer move. `progress` shows a bar; None does in a terminal.
    """

    batch_size: int | None = None
    jobs: int = 1
    stop_when_converged: bool = False
    progress: bool | None = None

    def __post_init__(self) -> None:
        check_jobs(self.jobs)
        size = self.batch_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise OptionError(f"batch_size is 1 or more, or None, not {size!r}.")
        for name in ("stop_when_converged", "progress"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "progress" and value is None):
                raise OptionError(f"{name} takes True or False, not {value!r}.")


def calibrate(prepared: GraphModule, samples: Sequence[Inputs], options: CalibrationOptions | None = None) -> int:
    """Show `samples` to the observers of `prepared`, which is of one device; returns how many were used.

    What the observers know afterwards does not depend on `options.jobs`. Raises `OptionError` where the observers do
    not merge and `jobs` is above 1, or where the model does not take batches of a given `batch_size`.
    """
    options = options or CalibrationOptions()
    samples = list(samples)
    observe_weights(prepared)
    single = bare(prepared)
    observers = _observers(single)
    batches = _batches(single, samples, observers, options)
    finds_ranges = (item for item in observers.items() if not isinstance(item[1], ChannelMeans))
    seeing = {name: observer for name, observer in finds_ranges if _merges(observer)}
    if options.jobs > 1 or options.stop_when_converged:
        _check_that_they_merge(observers)
    if options.stop_when_converged:
        todo = parts(samples, -(-len(samples) // WINDOW), WINDOW)
    else:
        todo = parts(samples, options.jobs * PARTS_OF_A_JOB if options.jobs > 1 else len(samples), batches.size)
    used, ranges = 0, None
    with bar("Calibrating", len(samples), options.progress) as advance:
        for part, state in zip(todo, _states(single, todo, batches, options), strict=True):
            for name, seen in (state or {}).items():
                observers[name].merge(seen)
            used += len(part)
            advance(len(part))
            if options.stop_when_converged:
                before, ranges = ranges, _ranges(seeing)
                if before is not None and _has_converged(before, ranges):
                    _LOGGER.info("Calibration has converged: it used %d of %d samples.", used, len(samples))
                    break
    return used


def _states(
    single: GraphModule, todo: list[Sequence[Inputs]], batches: Batches, options: CalibrationOptions
) -> Iterator[State | None]:
    """What the observers saw of each part; None where those of `single` saw it themselves."""
    import cloudpickle

    batched = in_batches(single, batches)
    if options.jobs == 1:
        for part in todo:
            yield _observe(single, batched, part, batches)
        return
    work = functools.partial(_observe_elsewhere, cloudpickle.dumps((single, batched)), batches)
    yield from in_order(work, todo, options.jobs)


@torch.no_grad()
def _observe(single: GraphModule, batched: GraphModule, part: Sequence[Inputs], batches: Batches) -> None:
    """Run `part`, as much of it as possible in batches."""
    size = batches.size
    whole = 0 if batches == SINGLE else len(part) // size * size
    for start in range(0, whole, size):
        _run(batched, batches.of(part[start : start + size]))
    for inputs in part[whole:]:
        _run(single, tuple(map(aligned, inputs)))


def _run(module: GraphModule, inputs: Inputs) -> None:
    """Run `module`. Raises `CalibrationError` that names the operator which fails on these inputs."""
    try:
        module(*inputs)
    except (OpenNeutronError, MemoryError):
        raise
    except Exception:
        with typed_errors("Running the model on the calibration data", CalibrationError):
            Interpreter(module).run(*inputs)
        raise


def _observe_elsewhere(model: bytes, batches: Batches, part: Sequence[Inputs]) -> State:
    """The same with observers of its own, which have seen nothing yet: what they saw."""
    single, batched = pickle.loads(model)
    _observe(single, batched, part, batches)
    return {name: observer.state() for name, observer in _observers(single).items() if _merges(observer)}


def _observers(module: GraphModule) -> dict[str, Any]:
    """The observers that a bare graph calls, each once, by the name of the first call's module."""
    found: dict[int, tuple[str, Any]] = {}
    for node in module.graph.nodes:
        if node.op == "call_module":
            observer = module.get_submodule(str(node.target))
            found.setdefault(id(observer), (str(node.target), observer))
    return dict(found.values())


def _merges(observer: Any) -> bool:
    if isinstance(observer, ObserverOfAnother):
        return _merges(observer.observer)
    return hasattr(observer, "merge")


def _that_do_not_merge(observers: Mapping[str, Any]) -> list[str]:
    """The types of the observers that go by what they are shown, and do not merge."""
    see = (observer for observer in observers.values() if not isinstance(observer, FixedQParamsObserver))
    return sorted({type(observer).__name__ for observer in see if not _merges(observer)})


def _check_that_they_merge(observers: Mapping[str, Any]) -> None:
    kinds = _that_do_not_merge(observers)
    if kinds:
        raise OptionError(
            "jobs and stop_when_converged need observers whose states merge, as those of DistributionObserver do, and "
            f"not of {', '.join(kinds)}. Leave these options or the observer out."
        )


def _batches(
    single: GraphModule, samples: list[Inputs], observers: Mapping[str, Any], options: CalibrationOptions
) -> Batches:
    """As asked for; unless asked, one sample at a time for observers that may count a batch as one sample."""
    wanted = options.batch_size
    if wanted is None and _that_do_not_merge(observers):
        return SINGLE
    batches = batches_of(single, samples, wanted)
    if wanted is not None and 1 < batches.size <= len(samples):
        reason = why_not_in_batches(single, samples, batches)
        if reason is not None:
            raise OptionError(f"The model does not run in batches of {batches.size}: {reason} Leave batch_size out.")
    return batches


Ranges = dict[str, tuple[float, float, float, float]]


def _ranges(observers: Mapping[str, Any]) -> Ranges:
    """Of each observer that saw something, the extremes and the ends of its range."""
    found: Ranges = {}
    for name, observer in observers.items():
        minimum, maximum = float(observer.min_val), float(observer.max_val)
        if minimum <= maximum:
            scale, zero_point = observer.calculate_qparams()
            low = float((observer.quant_min - zero_point) * scale)
            high = float((observer.quant_max - zero_point) * scale)
            found[name] = (minimum, maximum, low, high)
    return found


def _has_converged(before: Ranges, after: Ranges) -> bool:
    if before.keys() != after.keys():
        return False
    for name, (minimum, maximum, low, high) in after.items():
        widths = (maximum - minimum, maximum - minimum, high - low, high - low)
        moved = (abs(new - old) for new, old in zip(after[name], before[name], strict=True))
        if any(move > MOVEMENT * width for move, width in zip(moved, widths, strict=True)):
            return False
    return True

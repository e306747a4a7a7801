"""Runs a prepared model on calibration data, in batches and in several processes."""

from __future__ import annotations

import functools
import logging
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torchao.quantization.pt2e.observer import FixedQParamsObserver

from openneutron.calibration.bare_graph import (
    SINGLE,
    Batches,
    bare_graph,
    batched_graph,
    batching_failure,
    choose_batches,
    observe_weights,
)
from openneutron.core.boundary import typed_errors
from openneutron.core.evaluation import GraphRun
from openneutron.core.fx import placeholders
from openneutron.core.generated_code import code_on_demand
from openneutron.core.messages import as_sentence
from openneutron.core.parallel import check_jobs, map_in_order, split
from openneutron.core.progress import progress_bar
from openneutron.errors import CalibrationError, OpenNeutronError, OptionError
from openneutron.model.data import align
from openneutron.quantizer.bias_correction import ChannelMeans
from openneutron.quantizer.cell_ranges import CellObserver
from openneutron.quantizer.wrapping_observers import WrappingObserver

__all__ = ["CalibrationOptions", "calibrate"]

_LOGGER = logging.getLogger(__name__)

Inputs = tuple[Any, ...]
State = dict[str, Mapping[str, Tensor]]

# Calibration has converged if, over WINDOW samples, the extremes of every tensor move by at most MOVEMENT of the
# distance between them, and the ends of its range by at most MOVEMENT of the range.
WINDOW = 32
MOVEMENT = 0.01
# Number of parts into which the samples of each process are split. Each part sends the model to the worker again. If a
# worker fails, only one part is lost.
PARTS_OF_A_JOB = 2


@dataclass(frozen=True)
class CalibrationOptions:
    """Options of calibration. Raises `OptionError` for invalid values.

    `batch_size` is the number of samples that are run at once; None selects it by the size of the model. `jobs` is the
    number of processes that share the samples. `stop_when_converged` ends calibration when ranges no longer move.
    `progress` shows a progress bar; None shows it if stderr is a terminal.
    """

    batch_size: int | None = None
    jobs: int = 1
    stop_when_converged: bool = False
    progress: bool | None = None

    def __post_init__(self) -> None:
        check_jobs(self.jobs)
        size = self.batch_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise OptionError(f"batch_size must be an integer of 1 or more, or None, not {size!r}.")
        for name in ("stop_when_converged", "progress"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "progress" and value is None):
                raise OptionError(f"{name} takes True or False, not {value!r}.")


def calibrate(prepared: GraphModule, samples: Sequence[Inputs], options: CalibrationOptions | None = None) -> int:
    """Runs `prepared`, which must be on one device, on `samples`, and returns the number of samples that were used.

    The state of the observers afterwards does not depend on `options.jobs`. Raises `OptionError` if `jobs` is above 1
    and the states of the observers cannot be merged, or if the model does not run in batches of a given `batch_size`.
    """
    options = options or CalibrationOptions()
    samples = list(samples)
    observe_weights(prepared)
    with code_on_demand():
        single = bare_graph(prepared)
    observers = _observers_by_name(single)
    batches = _select_batches(single, samples, observers, options)
    finds_ranges = (item for item in observers.items() if not isinstance(item[1], (ChannelMeans, CellObserver)))
    seeing = {name: observer for name, observer in finds_ranges if _is_mergeable(observer)}
    if options.jobs > 1 or options.stop_when_converged:
        _check_mergeable(observers)
    if options.stop_when_converged:
        todo = split(samples, -(-len(samples) // WINDOW), WINDOW)
    else:
        todo = split(samples, options.jobs * PARTS_OF_A_JOB if options.jobs > 1 else len(samples), batches.size)
    used, ranges = 0, None
    with progress_bar("Calibrating", len(samples), options.progress) as advance:
        for part, state in zip(todo, _run_parts(single, todo, batches, options), strict=True):
            for name, seen in (state or {}).items():
                observers[name].merge(seen)
            used += len(part)
            advance(len(part))
            if options.stop_when_converged:
                before, ranges = ranges, _observed_ranges(seeing)
                if before is not None and _has_converged(before, ranges):
                    _LOGGER.info("Calibration has converged: it used %d of %d samples.", used, len(samples))
                    break
    return used


def _run_parts(
    single: GraphModule, todo: list[Sequence[Inputs]], batches: Batches, options: CalibrationOptions
) -> Iterator[State | None]:
    """Runs each part. Returns a result for each: the states of a worker's observers, or None with one job.

    With one job, the observers of `single` are called in this process.
    """
    import cloudpickle

    with code_on_demand():
        batched = batched_graph(single, batches)
    if options.jobs == 1:
        for part in todo:
            yield _observe_part(single, batched, part, batches)
        return
    work = functools.partial(_observe_in_worker, cloudpickle.dumps((single, batched)), batches)
    yield from map_in_order(work, todo, options.jobs)


@torch.no_grad()
def _observe_part(single: GraphModule, batched: GraphModule, part: Sequence[Inputs], batches: Batches) -> None:
    """Runs the samples of `part` in full batches on `batched`, and the remaining samples one by one on `single`."""
    size = batches.size
    whole = 0 if batches == SINGLE else len(part) // size * size
    for start in range(0, whole, size):
        _run_module(batched, batches.concatenate(part[start : start + size]))
    for inputs in part[whole:]:
        _run_module(single, tuple(map(align, inputs)))


def _run_module(module: GraphModule, inputs: Inputs) -> None:
    """Runs `module`. Raises a `CalibrationError` that names the operator if one fails on these inputs."""
    try:
        module(*inputs)
    except (OpenNeutronError, MemoryError):
        raise
    except Exception:
        with typed_errors("Running the model on the calibration data", CalibrationError):
            GraphRun(module, dict(zip(placeholders(module.graph), inputs, strict=True))).run()
        raise


def _observe_in_worker(model: bytes, batches: Batches, part: Sequence[Inputs]) -> State:
    """Runs `part` in another process, with new observers. Returns the states of the observers."""
    single, batched = pickle.loads(model)
    _observe_part(single, batched, part, batches)
    return {name: observer.state() for name, observer in _observers_by_name(single).items() if _is_mergeable(observer)}


def _observers_by_name(module: GraphModule) -> dict[str, Any]:
    """Returns all observers that a bare graph calls, by name. An observer with several names has the first one."""
    found: dict[int, tuple[str, Any]] = {}
    for node in module.graph.nodes:
        if node.op == "call_module":
            observer = module.get_submodule(str(node.target))
            found.setdefault(id(observer), (str(node.target), observer))
    return dict(found.values())


def _is_mergeable(observer: Any) -> bool:
    if isinstance(observer, WrappingObserver):
        return _is_mergeable(observer.observer)
    return hasattr(observer, "merge")


def _unmergeable_types(observers: Mapping[str, Any]) -> list[str]:
    """Returns the types of the observers that depend on the data and whose states cannot be merged."""
    see = (observer for observer in observers.values() if not isinstance(observer, FixedQParamsObserver))
    return sorted({type(observer).__name__ for observer in see if not _is_mergeable(observer)})


def _check_mergeable(observers: Mapping[str, Any]) -> None:
    kinds = _unmergeable_types(observers)
    if kinds:
        raise OptionError(
            "jobs and stop_when_converged need observers whose states can be merged, such as DistributionObserver, but "
            f"the model has {', '.join(kinds)}. Leave these options or the observer out."
        )


def _select_batches(
    single: GraphModule, samples: list[Inputs], observers: Mapping[str, Any], options: CalibrationOptions
) -> Batches:
    """Selects the batches of `options`. Raises `OptionError` if the model does not run in batches of a given size.

    Without a given size, observers whose states cannot be merged get one sample at a time, as they may count a batch as
    one sample.
    """
    wanted = options.batch_size
    if wanted is None and _unmergeable_types(observers):
        return SINGLE
    with typed_errors("Running the model on the calibration data", CalibrationError):
        batches = choose_batches(single, samples, wanted)
    if wanted is not None and 1 < batches.size <= len(samples):
        reason = batching_failure(single, samples, batches)
        if reason is not None:
            raise OptionError(
                f"The model does not run in batches of {batches.size}: {as_sentence(reason)} Leave batch_size out."
            )
    return batches


Ranges = dict[str, tuple[float, float, float, float]]


def _observed_ranges(observers: Mapping[str, Any]) -> Ranges:
    """Returns the extremes and the range of each observer that has seen values."""
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

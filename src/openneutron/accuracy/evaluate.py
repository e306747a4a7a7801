"""The accuracy of anything that runs: a module, a program, a loaded `.pte`."""

from __future__ import annotations

import functools
import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils._pytree import tree_unflatten
from torch.utils.data import DataLoader, Dataset

from openneutron.calibration.graph import bare
from openneutron.data import aligned, described, in_batches, items_of
from openneutron.errors import InputError, ModelError, OptionError
from openneutron.flow import NeutronProgram, QuantizedModel
from openneutron.fx import placeholders
from openneutron.parallel import check_jobs, in_order, parts
from openneutron.runtime.program import HostProgram

__all__ = ["evaluate", "top1"]

Sample = tuple[tuple[Any, ...], Any]
Metric = Callable[[Any, Any], Any]

# So many samples for each process are read at once, in so many parts: fewer parts send the model less often, more lose
# less with a worker.
SAMPLES_OF_A_JOB = 128
PARTS_OF_A_JOB = 2


def top1(outputs: Any, label: Any) -> float:
    """In percent, of how many rows of the outputs [rows, ...] the largest value is that of the label, one for each row.

    With one label, all of the outputs are its row. Raises `InputError` for other labels.
    """
    first = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
    try:
        labels = torch.as_tensor(label)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"top1 takes the number of a class, not {label!r}.") from error
    rows = first.reshape(1 if labels.numel() == 1 else len(first), -1)
    if labels.numel() != len(rows) or labels.is_floating_point():
        raise InputError(f"top1 takes the number of a class for each of {len(rows)} rows, not {described([labels])}.")
    return 100.0 * float((rows.argmax(1) == labels.flatten()).double().mean())


def evaluate(run: Any, data: Iterable[Any] | Dataset[Any], metric: str | Metric = "top1", jobs: int = 1) -> float:
    """The mean of `metric` over the samples of `data`: pairs of inputs (a tensor, or a tuple of them) and label.

    `run` is a module, what `quantize` or `lower` returned, or a loaded `.pte`. `data` is an iterable or a data set of
    pairs, or a DataLoader, whose batches are cut to the batch size of `run`, of a module with none to 1; what does not
    fill the last one is left out. `metric` is "top1", the percentage of samples whose class is right, or a function of
    outputs and label that returns a number. `jobs` processes share the samples, and `joblib.parallel_config` says
    where; the number is the same to the bit. A function as `metric` must then be one that can be pickled. Samples are
    read as they are needed, so that data may be larger than memory.

    Raises `OptionError` for another `metric` or `jobs`, `InputError` for data that are empty or no pairs, and
    `ModelError` where `jobs` is above 1 and the module cannot be pickled.
    """
    check_jobs(jobs)
    if metric != "top1" and not callable(metric):
        raise OptionError(f"metric is 'top1' or a function of outputs and label, not {metric!r}.")
    score = metric if callable(metric) else top1
    run = HostProgram.from_bytes(run.portable) if isinstance(run, NeutronProgram) else run
    scores = list(_all_scores(run, score, _samples(data, _batch_size(run)), jobs))
    if not scores:
        raise InputError("There are no data to evaluate on: give pairs of inputs and label.")
    return math.fsum(scores) / len(scores)


def _all_scores(run: Any, score: Metric, samples: Iterator[Sample], jobs: int) -> Iterator[float]:
    """In order. Samples are read as they are needed, and let go."""
    if jobs == 1:
        runs = run.run if isinstance(run, HostProgram) else run
        for sample in samples:
            yield from _scores(runs, score, [sample])
        return
    work = functools.partial(_scores_elsewhere, _pickled(run), score)
    while some := list(islice(samples, jobs * SAMPLES_OF_A_JOB)):
        for part in in_order(work, parts(some, jobs * PARTS_OF_A_JOB), jobs):
            yield from part


def _batch_size(run: Any) -> int:
    """Of what `run` takes; 1 where any will do."""
    if isinstance(run, HostProgram):
        sizes: Sequence[Any] = run.inputs[0].shape
    elif isinstance(run, QuantizedModel):
        sizes = run.example_inputs[0].shape
    elif isinstance(run, GraphModule) and "val" in (first := placeholders(run.graph)[0]).meta:
        sizes = first.meta["val"].shape
    elif callable(run):
        return 1
    else:
        raise OptionError(f"run is a module, a NeutronProgram or a loaded .pte, not {run!r}.")
    return sizes[0] if sizes and isinstance(sizes[0], int) else 1


def _samples(data: Iterable[Any] | Dataset[Any], size: int) -> Iterator[Sample]:
    for index, item in enumerate(items_of(data)):
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise InputError(f"Sample {index} is no pair of inputs and label but a {type(item).__name__}.")
        inputs = tuple(item[0]) if isinstance(item[0], (tuple, list)) else (item[0],)
        pair = *inputs, item[1]
        for *part, label in in_batches(pair, [size] * len(pair)) if _is_batch(data, pair) else [pair]:
            yield tuple(part), label


def _is_batch(data: Any, values: Sequence[Any]) -> bool:
    """Whether these are as many of each, made by a DataLoader."""
    if not isinstance(data, DataLoader) or not all(map(_has_length, values)):
        return False
    return len({len(value) for value in values}) == 1


def _has_length(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or (isinstance(value, torch.Tensor) and value.dim() > 0)


@torch.no_grad()
def _scores(run: Callable[..., Any], score: Metric, samples: Sequence[Sample]) -> list[float]:
    return [float(score(run(*map(aligned, inputs)), label)) for inputs, label in samples]


def _scores_elsewhere(pickled: bytes, score: Metric, samples: Sequence[Sample]) -> list[float]:
    return _scores(pickle.loads(pickled), score, samples)


@dataclass(frozen=True)
class _Program:
    """A `.pte` that is loaded in the process that runs it."""

    buffer: bytes

    def __call__(self, *inputs: Any) -> Any:
        return self._loaded.run(*inputs)

    @functools.cached_property
    def _loaded(self) -> HostProgram:
        return HostProgram.from_bytes(self.buffer)


class _Exported(torch.nn.Module):
    """An exported module without what cannot be pickled."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__()
        self.bare = bare(module)
        info = getattr(module.graph._codegen, "pytree_info", None)
        self.form = None if info is None else info.out_spec

    def forward(self, *inputs: torch.Tensor) -> Any:
        """The outputs in the form that the module gives them."""
        outputs = list(self.bare(*inputs))
        return outputs[0] if self.form is None else tree_unflatten(outputs, self.form)


def _pickled(run: Any) -> bytes:
    """`run` for another process: a program as its bytes, an exported module as torch saves one."""
    import cloudpickle

    run = run.module if isinstance(run, QuantizedModel) else run
    if isinstance(run, HostProgram):
        run = _Program(run.buffer)
    elif isinstance(run, GraphModule):
        run = _Exported(run)
    try:
        return bytes(cloudpickle.dumps(run))
    except (TypeError, AttributeError, RuntimeError, pickle.PicklingError) as error:
        raise ModelError(f"This {type(run).__name__} cannot be sent to other processes, use jobs=1: {error}") from error

"""Evaluates a metric on a module, a program or a loaded `.pte`."""

from __future__ import annotations

import functools
import math
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.data import DataLoader, Dataset

from openneutron.calibration.bare_graph import bare_graph
from openneutron.core.boundary import typed_errors
from openneutron.core.fx import output_node, placeholders
from openneutron.core.parallel import check_jobs, map_in_order, split
from openneutron.errors import InputError, ModelError, OptionError
from openneutron.flow import NeutronProgram, QuantizedModel
from openneutron.model.arguments import MISSING, Leaf, leaves_at
from openneutron.model.data import align, describe, in_batches, items_of
from openneutron.model.examples import Examples, leaves_of, register_dataclasses, to_tensors
from openneutron.model.state import Stream, has_state, reset
from openneutron.runtime.native import native_module
from openneutron.runtime.program import HostProgram, TensorInfo, load

__all__ = ["evaluate", "top1"]

Sample = tuple[Examples, Any]
"""The arguments of a run, and the label for its outputs."""
Metric = Callable[[Any, Any], Any]

# Number of samples that are read at once for each process, and number of parts into which these samples are split. Each
# part sends the model to the worker again. If a worker fails, only one part is lost.
SAMPLES_OF_A_JOB = 128
PARTS_OF_A_JOB = 2


def top1(outputs: Any, label: Any) -> float:
    """Returns the percentage of rows whose largest value is at the index of the label.

    Uses the first tensor of the outputs, with shape [rows, ...], and one label for each row. With a single label, the
    whole tensor is one row. Raises `InputError` for another number of labels, and for labels that are not integers.
    """
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    if not tensors:
        raise InputError("top1 needs a tensor among the outputs, but there is none. Give a function as metric.")
    first = tensors[0]
    try:
        labels = torch.as_tensor(label)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"top1 takes class indices as labels, not {label!r}.") from error
    rows = first.reshape(1 if labels.numel() == 1 else len(first), -1)
    if labels.numel() != len(rows) or labels.is_floating_point():
        raise InputError(f"top1 takes a class index for each of {len(rows)} rows, not {describe([labels])}.")
    return 100.0 * float((rows.argmax(1) == labels.flatten()).double().mean())


def evaluate(run: Any, data: Iterable[Any] | Dataset[Any], metric: str | Metric = "top1", jobs: int = 1) -> float:
    """Returns the mean of `metric` over `data`.

    `run` is a module, a result of `quantize` or `lower`, an exported program, or a `.pte` (loaded, as path or as
    bytes).

    `data` is an iterable or a data set of pairs of inputs and label, or a DataLoader of such batches. Inputs are a
    tensor, a numpy array, a tuple of the arguments of `run`, or a mapping from their names. Batches of a DataLoader are
    split to the batch size of `run`, or to 1 for a module without a fixed batch size; an incomplete last batch is
    dropped. Samples are read when they are needed, so the data may be larger than memory.

    `metric` is "top1", the percentage of samples with the right class, or a function of outputs and label that returns
    a number. `jobs` processes share the samples, and `joblib.parallel_config` selects the kind of process; the result
    is bitwise equal for any number and kind of processes. With `jobs` above 1, a function `metric` must be picklable.

    A model with state needs `jobs=1`. It runs all samples as one stream, or each `Stream` of pairs in `data` from the
    initial state.

    Raises `OptionError` for an invalid `metric` or `jobs`, `InputError` for data that are empty or not pairs,
    `ModelError` if `jobs` is above 1 and the module cannot be pickled, and `NativeModuleError` for a program if the
    native module is not installed.
    """
    check_jobs(jobs)
    if metric != "top1" and not callable(metric):
        raise OptionError(f"metric must be 'top1' or a function of outputs and label, not {metric!r}.")
    score = metric if callable(metric) else top1
    run = _as_runnable(run)
    if isinstance(run, HostProgram):
        native_module()
    if jobs > 1 and _has_state(run):
        raise _state_needs_one_job()
    begin = (lambda: _reset_state(run)) if jobs == 1 else _reject_streams
    with typed_errors("Reading the data", InputError):
        scores = list(_all_scores(run, score, _samples(data, _batch_size(run), begin), jobs))
    if not scores:
        raise InputError("The data are empty. Give pairs of inputs and label.")
    return math.fsum(scores) / len(scores)


def _as_runnable(run: Any) -> Any:
    if isinstance(run, NeutronProgram):
        return HostProgram(run.portable, leaves=run.leaves)
    if isinstance(run, (str, bytes, os.PathLike)):
        return load(run)
    return run.module() if isinstance(run, ExportedProgram) else run


def _all_scores(run: Any, score: Metric, samples: Iterator[Sample], jobs: int) -> Iterator[float]:
    """Returns the scores in order. Reads samples when they are needed, and keeps none."""
    if jobs == 1:
        runs = run.run if isinstance(run, HostProgram) else run
        for index, sample in enumerate(samples):
            yield from _scores(runs, score, [sample], index)
        return
    work = functools.partial(_scores_in_worker, _pickled(run), score)
    while some := list(islice(samples, jobs * SAMPLES_OF_A_JOB)):
        for part in map_in_order(work, split(some, jobs * PARTS_OF_A_JOB), jobs):
            yield from part


def _batch_size(run: Any) -> int:
    """Returns the batch size of `run`; 1 if it has no fixed batch size."""
    if isinstance(run, HostProgram):
        inputs: Sequence[Any] = run.inputs
    elif isinstance(run, QuantizedModel):
        inputs = run.examples.leaves
    elif isinstance(run, GraphModule):
        inputs = [node.meta.get("val") for node in placeholders(run.graph)]
    elif callable(run):
        return 1
    else:
        raise OptionError(f"run must be a module, a NeutronProgram or a loaded .pte, not {run!r}.")
    sizes = next((value.shape for value in inputs if isinstance(value, (TensorInfo, torch.Tensor))), ())
    return sizes[0] if sizes and isinstance(sizes[0], int) else 1


def _has_state(run: Any) -> bool:
    module = run.module if isinstance(run, QuantizedModel) else run
    if isinstance(module, GraphModule):
        return has_state(module)
    return isinstance(run, HostProgram) and run.has_state


def _reset_state(run: Any) -> None:
    """Resets the state of `run` before the first step of a stream."""
    if isinstance(run, (HostProgram, QuantizedModel)):
        run.reset()
    else:
        reset(run)


def _reject_streams() -> None:
    raise _state_needs_one_job()


def _state_needs_one_job() -> OptionError:
    return OptionError("The model carries state from one sample to the next, which processes cannot share. Use jobs=1.")


def _samples(
    data: Iterable[Any] | Dataset[Any], size: int, begin: Callable[[], None] = lambda: None
) -> Iterator[Sample]:
    """Returns pairs of arguments and label. Calls `begin` before the first pair of each `Stream`."""
    for index, item in enumerate([data] if isinstance(data, Stream) else items_of(data)):
        if isinstance(item, Stream):
            begin()
            yield from _samples(item.steps, size)
            continue
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise InputError(f"Sample {index} is a {type(item).__name__} instead of a pair of inputs and label.")
        inputs = tuple(item[0]) if isinstance(item[0], (tuple, list)) and not hasattr(item[0], "_fields") else item[0]
        register_dataclasses(inputs)
        leaves, structure = tree_flatten(tree_map(to_tensors, inputs))
        pair = *leaves, item[1]
        for *part, label in in_batches(pair, [size] * len(pair)) if _is_batch(data, pair) else [pair]:
            yield _arguments(tree_unflatten(part, structure)), label


def _arguments(inputs: Any) -> Examples:
    if isinstance(inputs, Mapping):
        return Examples((), dict(inputs))
    return Examples(inputs if isinstance(inputs, tuple) and not hasattr(inputs, "_fields") else (inputs,))


def _is_batch(data: Any, values: Sequence[Any]) -> bool:
    """Whether `values` come from a DataLoader and all have the same length."""
    if not isinstance(data, DataLoader) or not all(map(_has_length, values)):
        return False
    return len({len(value) for value in values}) == 1


def _has_length(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or (isinstance(value, torch.Tensor) and value.dim() > 0)


@torch.no_grad()
def _scores(run: Callable[..., Any], score: Metric, samples: Sequence[Sample], first: int = 0) -> list[float]:
    scores = []
    for index, (inputs, label) in enumerate(samples, first):
        with typed_errors(f"Running the model on sample {index}", InputError):
            outputs = run(*tree_map(align, inputs.args), **tree_map(align, inputs.kwargs))
        with typed_errors(f"The metric of sample {index}", OptionError):
            scores.append(float(score(outputs, label)))
    return scores


def _scores_in_worker(pickled: bytes, score: Metric, samples: Sequence[Sample]) -> list[float]:
    return _scores(pickle.loads(pickled), score, samples)


@dataclass(frozen=True)
class _Program:
    """A picklable `.pte`. The process that runs it loads it on the first call."""

    buffer: bytes
    leaves: tuple[Leaf, ...] | None

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return self._loaded.run(*inputs, **named)

    @functools.cached_property
    def _loaded(self) -> HostProgram:
        return HostProgram(self.buffer, leaves=self.leaves)


class _Exported(torch.nn.Module):
    """An exported module without its unpicklable parts."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__()
        self.bare = bare_graph(module)
        self.paths = [leaf.path for leaf in leaves_of(module)]
        info = getattr(module.graph._codegen, "pytree_info", None)
        self.form = None if info is None else info.out_spec
        returned = tree_leaves(output_node(module.graph).args[0])
        self.constants = [MISSING if isinstance(leaf, Node) else leaf for leaf in returned]

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Returns the outputs in the structure of the exported module."""
        outputs = list(self.bare(*leaves_at(self.paths, inputs, named)))
        if self.form is None:
            return outputs[0]
        tensors = iter(outputs)
        leaves = [next(tensors) if constant is MISSING else constant for constant in self.constants]
        return tree_unflatten(leaves, self.form)


def _pickled(run: Any) -> bytes:
    """Pickles `run` for another process: a program by its bytes, an exported module without its guards."""
    import cloudpickle

    run = run.module if isinstance(run, QuantizedModel) else run
    if isinstance(run, HostProgram):
        run = _Program(run.buffer, run.leaves)
    elif isinstance(run, GraphModule):
        run = _Exported(run)
    try:
        return bytes(cloudpickle.dumps(run))
    except (TypeError, AttributeError, RuntimeError, pickle.PicklingError) as error:
        raise ModelError(
            f"This {type(run).__name__} cannot be pickled for other processes: {error} Use jobs=1."
        ) from error

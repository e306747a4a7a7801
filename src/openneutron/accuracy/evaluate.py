"""Evaluates a metric on modules, programs and loaded `.pte` files."""

from __future__ import annotations

import functools
import math
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_leaves, tree_map, tree_structure, tree_unflatten

from openneutron.accuracy.labelled import LabelledData, LabelledSample, labelled_samples, open_labelled
from openneutron.accuracy.metrics import ClassScores, Metric, NamedMetric, class_scores, metric_of, top1, top5
from openneutron.accuracy.runs import (
    RunReset,
    as_runnable,
    batch_size,
    carries_state,
    input_forms,
    pickle_runs,
    state_needs_one_job,
    to_call,
)
from openneutron.core.boundary import typed_errors
from openneutron.core.parallel import check_jobs, map_in_order, split
from openneutron.core.user_code import code_of_user
from openneutron.data.samples import Samples
from openneutron.errors import InputError, OptionError
from openneutron.model.data import align
from openneutron.model.examples import Examples, examples_of, register_dataclasses
from openneutron.model.exporting import outputs_of
from openneutron.results.side_by_side import RIGHT, RunScores, SideBySide

__all__ = ["check_classes", "evaluate", "evaluate_side_by_side", "top1", "top5"]

Progress = Callable[[int, int], None]
"""A function of the number of samples that are done, and the number of all samples, 0 if it is unknown."""

# Number of samples that are read at once for each process, and number of parts into which these samples are split. Each
# part sends the models to the worker again. If a worker fails, only one part is lost.
SAMPLES_OF_A_JOB = 128
PARTS_OF_A_JOB = 2
_NO_INPUTS = Examples(())


@dataclass(frozen=True)
class _Score:
    """The score of one run on one sample, which is a batch of rows; for top1 and top5 also the scores of its rows."""

    value: float
    classes: ClassScores | None = None


def evaluate(
    run: Any,
    data: LabelledData,
    metric: str | Metric = "top1",
    jobs: int = 1,
    *,
    transform: Callable[[Any], Any] | None = None,
) -> float:
    """Returns the mean of `metric` over `data`.

    `run` is a module, a result of `quantize` or `lower`, an exported program, or a `.pte` (loaded, as path or as
    bytes). The file at a path runs in a process of its own, so that a damaged file raises HostError.

    `data` is one of:

    - An iterable or a data set of pairs of inputs and label, or a DataLoader of such batches. Inputs are a tensor, a
      numpy array, a tuple of the arguments of `run`, or a mapping from their names. Batches of a DataLoader are split
      to the batch size of `run`, or to 1 for a module without a fixed batch size.
    - Labelled `Samples` of `openneutron.data`, or a text or path that `read_data` reads: a folder with a folder for
      each class, a CSV of path and label, or "file.py:function". They are stacked to the batch size of `run`.

    An incomplete last batch is dropped. Samples are read when they are needed, so the data may be larger than memory.
    `transform` converts the inputs of each sample. Without it, images and recordings of files are converted as in
    calibration (`quantize`), if the sizes of the inputs of `run` are known; they are not for a module that is not
    exported.

    `metric` is "top1" or "top5", the percentage of samples whose class has the largest value or one of the five
    largest; or a function of outputs and label that returns a number, or "file.py:function". `jobs` processes share the
    samples, and `joblib.parallel_config` selects the kind of process; the result is bitwise equal for any number and
    kind of processes. With `jobs` above 1, a function `metric` must be picklable. A program with int8 inputs
    (`int8_io`) takes integers, or floats, which are then quantized, and its outputs dequantized.

    A model with state needs `jobs=1`. It runs all samples as one stream from the initial state, or each `Stream` of
    pairs in `data`, and has the initial state again afterwards. For a float module, this is the state of its buffers
    when `evaluate` is called.

    Raises `OptionError` for an invalid `metric` or `jobs`; `InputError` for data that are empty or not pairs, and for
    names of classes that are more or fewer than the model's classes; `ModelError` if `jobs` is above 1 and the module
    cannot be pickled; and `NativeModuleError` for a program if the native module is not installed.
    """
    return evaluate_side_by_side({"run": run}, data, metric, jobs, transform=transform).runs[0].value


def evaluate_side_by_side(
    runs: Mapping[str, Any],
    data: LabelledData,
    metric: str | Metric = "top1",
    jobs: int = 1,
    *,
    transform: Callable[[Any], Any] | None = None,
    progress: Progress | None = None,
) -> SideBySide:
    """Evaluates several forms of a model on the same samples, each of which is read once.

        found = evaluate_side_by_side({"float": model, "int8": quantized, ".pte": program}, "labelled/")

    `runs` maps names to values of `run` as in `evaluate`. The others are compared with the first one. `data`,
    `metric`, `jobs` and `transform` are as in `evaluate`. Images are converted to the input of the first run whose
    sizes are known, so a module that is not exported takes the same inputs as the others. `metric` gets the outputs of
    each run in the structure of the first run's outputs, if they have as many values. `progress` is called with the
    number of samples that are done, and the number of all, 0 if it is unknown.

    Raises the errors of `evaluate`, and `OptionError` for runs with different batch sizes or without a run.
    """
    check_jobs(jobs)
    if not isinstance(runs, Mapping) or not runs:
        raise OptionError(f"runs must be a mapping from names to models, such as {{'float': model}}, not {runs!r}.")
    chosen = metric_of(metric)
    models = [as_runnable(run) for run in runs.values()]
    if jobs > 1 and any(map(carries_state, models)):
        raise state_needs_one_job()
    resets = [RunReset(model) for model in models]
    begin = functools.partial(_call_each, resets) if jobs == 1 else _reject_streams
    size = _common_batch_size(runs, models)
    forms = next((forms for model in models if (forms := input_forms(model)) is not None), None)
    with typed_errors("Reading the data", InputError):
        opened, transform = open_labelled(data, transform)
        check = functools.partial(_check_classes, _complete_classes(opened))
        rows = _Rows(len(models))
        total = _known_length(opened) // size
        samples = labelled_samples(opened, size, forms, transform, begin)
        _call_each(resets)
        try:
            for sample, scores in _all_scores(models, chosen, samples, jobs):
                if not rows.count:
                    check(scores[0].classes)
                rows.add(sample, scores)
                if progress is not None:
                    progress(rows.count, total)
        finally:
            _call_each(resets)  # the next use of a model does not begin with a state of these samples
    if not rows.count:
        raise InputError("The data are empty. Give pairs of inputs and label.")
    source = opened if isinstance(opened, Samples) else data
    return rows.result(chosen, tuple(runs), source if isinstance(source, Samples) else None)


def _call_each(functions: Sequence[Callable[[], None]]) -> None:
    for function in functions:
        function()


def _reject_streams() -> None:
    raise state_needs_one_job()


def _common_batch_size(runs: Mapping[str, Any], models: Sequence[Any]) -> int:
    sizes = {name: size for name, model in zip(runs, models, strict=True) if (size := batch_size(model)) is not None}
    if len(set(sizes.values())) > 1:
        described = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise OptionError(f"The runs have different batch sizes: {described}. Evaluate them one by one.")
    return next(iter(sizes.values()), 1)


def _known_length(data: Any) -> int:
    return len(data) if hasattr(data, "__len__") else 0


def check_classes(model: Any, example_inputs: Any, data: LabelledData, metric: str | Metric = "top1") -> None:
    """Compares the classes of labelled files with the output of a model, and evaluates nothing.

    A build calls it before its first long step. Does nothing for a metric without classes, for data whose labels are
    not known without reading the samples, and for a model that is not a module in eval mode or has no example inputs.
    Raises the errors that `evaluate` raises for these labels.
    """
    rank = metric_of(metric).rank
    if rank is None or not isinstance(model, nn.Module) or model.training or example_inputs is None:
        return
    opened, _ = open_labelled(data, None) if isinstance(data, (str, os.PathLike, Samples)) else (None, None)
    if not isinstance(opened, Samples) or not opened.labels:
        return
    reset = RunReset(model)
    reset()
    try:
        outputs = outputs_of(model, examples_of(example_inputs, model))
    finally:
        reset()
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    rows = len(tensors[0]) if tensors and tensors[0].dim() > 1 else 1
    for label in (min(opened.labels), max(opened.labels)):
        found = class_scores(outputs, torch.full((rows,), label), rank)
        _check_classes(_complete_classes(opened), found)


def _complete_classes(data: Any) -> int | None:
    """Returns the number of classes, if the data name all of them."""
    if not isinstance(data, Samples) or data.class_names is None or not data.class_names.are_complete:
        return None
    return len(data.class_names.names)


def _check_classes(named: int | None, scores: ClassScores | None) -> None:
    """Raises `InputError` unless the data name as many classes as the model's output has.

    Otherwise, class 3 of ten folders would be taken for output 3 of a thousand.
    """
    if named is None or scores is None or named == scores.count:
        return
    raise InputError(
        f"The data name {named} classes, but the model's output has {scores.count}, so the index of each class is not "
        "known. Give the names of all classes of the model in the order of its outputs (--labels FILE, or in Python "
        "read_data(..., labels=FILE)), or name folders and labels by the indices."
    )


def _all_scores(
    models: Sequence[Any], metric: NamedMetric, samples: Iterator[LabelledSample], jobs: int
) -> Iterator[tuple[LabelledSample, list[_Score]]]:
    """Returns the scores of all models on each sample, in order, with a sample without inputs.

    Reads samples when they are needed, and keeps none.
    """
    if jobs == 1:
        calls = [to_call(model) for model in models]
        for index, sample in enumerate(samples):
            yield _without_inputs(sample), _scores(calls, metric, sample, index)
        return
    work = functools.partial(_scores_in_worker, pickle_runs(models, metric))
    first = 0
    while some := list(islice(samples, jobs * SAMPLES_OF_A_JOB)):
        parts = split(list(enumerate(some, first)), jobs * PARTS_OF_A_JOB)
        first += len(some)
        found = chain.from_iterable(map_in_order(work, parts, jobs))
        yield from zip(map(_without_inputs, some), found, strict=True)


def _without_inputs(sample: LabelledSample) -> LabelledSample:
    return LabelledSample(_NO_INPUTS, sample.label, sample.names, sample.paths)


@torch.no_grad()
def _scores(calls: Sequence[Any], metric: NamedMetric, sample: LabelledSample, index: int) -> list[_Score]:
    what = f"sample {index}" if len(sample.names) != 1 else sample.names[0]
    scores = []
    form: TreeSpec | None = None
    for call in calls:
        with typed_errors(f"Running the model on {what}", InputError):
            outputs = call(*tree_map(align, sample.inputs.args), **tree_map(align, sample.inputs.kwargs))
        if form is not None:
            outputs = _in_form(outputs, form)
        elif len(calls) > 1:
            register_dataclasses(outputs)
            form = tree_structure(outputs)
        with code_of_user(f"The metric of {what}", OptionError):
            scores.append(_score(metric, outputs, sample.label))
    return scores


def _in_form(outputs: Any, form: TreeSpec) -> Any:
    """Returns a value or a flat tuple in the structure `form`, if that has as many values; else `outputs`.

    A program returns a value or a flat tuple. `form` is the structure of the outputs of the first run of
    `evaluate_side_by_side`.
    """
    leaves = tree_leaves(outputs)
    flat = tuple(leaves) if type(outputs) is tuple else leaves[0] if leaves else None
    is_flat = tree_structure(outputs) == tree_structure(flat)
    return tree_unflatten(leaves, form) if is_flat and len(leaves) == form.num_leaves else outputs


def _score(metric: NamedMetric, outputs: Any, label: Any) -> _Score:
    if metric.rank is None:
        value = float(metric.function(outputs, label))
        if math.isnan(value):
            raise OptionError(f"The metric '{metric.name}' returned NaN. Give a metric that returns a number.")
        return _Score(value)
    found = class_scores(outputs, label, metric.rank)
    return _Score(found.percentage, found)


def _scores_in_worker(pickled: bytes, samples: Sequence[tuple[int, LabelledSample]]) -> list[list[_Score]]:
    calls, metric = pickle.loads(pickled)
    return [_scores(calls, metric, sample, index) for index, sample in samples]


class _Rows:
    """Collects the scores of samples, by rows."""

    def __init__(self, runs: int) -> None:
        self.count = 0
        self.values: list[list[float]] = [[] for _ in range(runs)]
        self.scores: list[list[float]] = [[] for _ in range(runs)]
        self.predictions: list[list[int]] = [[] for _ in range(runs)]
        self.labels: list[int] = []
        self.names: list[str] = []
        self.paths: list[Any] = []

    def add(self, sample: LabelledSample, scores: Sequence[_Score]) -> None:
        self.count += 1
        for run, score in enumerate(scores):
            self.values[run].append(score.value)
            if score.classes is None:
                self.scores[run].append(score.value)
                continue
            self.scores[run] += [RIGHT if hit else 0.0 for hit in score.classes.hits]
            self.predictions[run] += score.classes.predictions
        if scores[0].classes is not None:
            self.labels += scores[0].classes.labels
        self.names += sample.names
        self.paths += sample.paths

    def result(self, metric: NamedMetric, names: Sequence[str], data: Samples | None) -> SideBySide:
        has_classes = metric.rank is not None
        runs = tuple(
            RunScores(
                name,
                math.fsum(values) / len(values),
                tuple(scores),
                tuple(predictions) if has_classes else None,
            )
            for name, values, scores, predictions in zip(names, self.values, self.scores, self.predictions, strict=True)
        )
        is_named = len(self.names) == len(runs[0].scores)
        return SideBySide(
            metric.name,
            runs,
            tuple(self.labels) if has_classes else None,
            tuple(self.names) if is_named else None,
            tuple(self.paths) if is_named else None,
            None if data is None else data.classes,
            None if data is None or data.is_given else data,
        )

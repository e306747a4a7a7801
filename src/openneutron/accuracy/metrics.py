"""Metrics of one run of a model: the share of right classes, or a function of the user."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from openneutron.core.messages import did_you_mean
from openneutron.core.objects import is_reference, load_object
from openneutron.errors import InputError, OptionError
from openneutron.model.data import describe

__all__ = ["ClassScores", "Metric", "NamedMetric", "class_scores", "metric_of", "top1", "top5"]

Metric = Callable[[Any, Any], Any]
"""A function of the outputs of a run and the label that returns a number."""
RANKS = {"top1": 1, "top5": 5}


@dataclass(frozen=True)
class ClassScores:
    """For each row of an output: whether its class is right, the class of its largest value, and its label.

    `count` is the number of classes of the output.
    """

    hits: tuple[bool, ...]
    predictions: tuple[int, ...]
    labels: tuple[int, ...]
    count: int

    @property
    def percentage(self) -> float:
        """The percentage of right rows."""
        return 100.0 * float(torch.tensor(self.hits, dtype=torch.float64).mean())


@dataclass(frozen=True)
class NamedMetric:
    """A metric and its name in reports. `rank` is 1 for top1 and 5 for top5, which are percentages; else None."""

    name: str
    function: Metric
    rank: int | None = None


def class_scores(outputs: Any, label: Any, rank: int = 1) -> ClassScores:
    """Returns which rows have the label's class among the `rank` largest values. Among equal values, the first counts
    as the largest.

    Uses the first tensor of the outputs, with shape [rows, ...], and one label for each row. With a single label, the
    whole tensor is one row. Raises `InputError` for another number of labels, for labels that are not integers, and for
    a label that is not an index of a row.
    """
    name = next(name for name, value in RANKS.items() if value == rank)
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    if not tensors:
        raise InputError(f"{name} needs a tensor among the outputs, but there is none. Give a function as metric.")
    first = tensors[0]
    if not first.numel():
        raise InputError(
            f"{name} needs an output with values for classes, but the first output has shape {tuple(first.shape)}. "
            "Give a function as metric."
        )
    try:
        labels = torch.as_tensor(label)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} takes class indices as labels, not {label!r}.") from error
    rows = first.reshape(1 if labels.numel() == 1 or not first.dim() else len(first), -1)
    if labels.numel() != len(rows) or labels.is_floating_point():
        raise InputError(f"{name} takes a class index for each of {len(rows)} rows, not {describe([labels])}.")
    indices = labels.flatten().long()
    outside = indices[(indices < 0) | (indices >= rows.shape[1])]
    if len(outside):
        first_of = f" {name} reads the first of {len(tensors)} outputs; for another, give a function as metric."
        raise InputError(
            f"The label {int(outside[0])} is not an index of the output, which has {rows.shape[1]} classes. Give "
            f"labels from 0 to {rows.shape[1] - 1}.{first_of if len(tensors) > 1 else ''}"
        )
    own = rows.gather(1, indices[:, None])
    # NaN is neither smaller nor equal, so it counts as larger.
    is_before = torch.arange(rows.shape[1]) < indices[:, None]
    larger = ~(rows <= own) | ((rows == own) & is_before)
    hits = larger.sum(1) < rank
    return ClassScores(
        tuple(map(bool, hits.tolist())), tuple(rows.argmax(1).tolist()), tuple(indices.tolist()), rows.shape[1]
    )


def top1(outputs: Any, label: Any) -> float:
    """Returns the percentage of rows whose largest value is at the index of the label.

    See `class_scores` for the forms of `outputs` and `label`, and for the errors.
    """
    return class_scores(outputs, label, 1).percentage


def top5(outputs: Any, label: Any) -> float:
    """Returns the percentage of rows that have the label's class among the five largest values."""
    return class_scores(outputs, label, 5).percentage


def metric_of(metric: str | Metric) -> NamedMetric:
    """Returns the metric that is given as "top1", "top5", "file.py:function", "package.module:function", or a function.

    Raises `OptionError` for anything else, and the errors of `load_object`.
    """
    if isinstance(metric, str) and metric in RANKS:
        return NamedMetric(metric, {"top1": top1, "top5": top5}[metric], RANKS[metric])
    if isinstance(metric, str) and is_reference(metric):
        found = load_object(metric, "The metric")
        if not callable(found):
            raise OptionError(
                f"The metric '{metric}' is a {type(found).__name__}, not a function of outputs and label."
            )
        return NamedMetric(metric.rpartition(":")[2], found)
    if callable(metric):
        return NamedMetric(getattr(metric, "__name__", type(metric).__name__), metric, _rank_of(metric))
    raise OptionError(
        f"metric must be 'top1', 'top5', a function of outputs and label, or 'file.py:function', not {metric!r}."
        + did_you_mean(str(metric), RANKS)
    )


def _rank_of(metric: Metric) -> int | None:
    return 1 if metric is top1 else 5 if metric is top5 else None

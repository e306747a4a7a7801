"""Results of several forms of a model on the same labelled samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openneutron.core.json_values import without_infinite_numbers
from openneutron.data.samples import Samples
from openneutron.errors import OptionError
from openneutron.results.intervals import normal_interval, wilson_interval

__all__ = ["ChangedSample", "RunScores", "SideBySide"]

RIGHT = 100.0
"""The score of a sample with the right class."""


@dataclass(frozen=True)
class RunScores:
    """The result of one run: the mean of its scores, and the score of each sample.

    For top1 and top5, scores are 0 or 100, and `predictions` has the class with the largest value of each sample.
    """

    name: str
    value: float
    scores: tuple[float, ...] = field(repr=False)
    predictions: tuple[int, ...] | None = field(default=None, repr=False)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of `value`: Wilson's for percentages, else `normal_interval`."""
        if self.predictions is not None:
            return wilson_interval(self.value, len(self.scores))
        return normal_interval(self.scores)


@dataclass(frozen=True)
class ChangedSample:
    """A sample that is right in one run and wrong in another.

    `before` and `after` are the classes with the largest values in the first run and in the other run.
    """

    index: int
    name: str
    path: Path | None
    label: int
    before: int
    after: int
    is_lost: bool
    """Whether the first run is right and the other run is wrong."""


@dataclass(frozen=True)
class SideBySide:
    """The results of runs on the same samples. The other runs are compared with the first one.

    `names` and `paths` belong to the samples if the data are files. `classes` has the names of the classes if the data
    name them. `labels` is None for a metric that is a function.
    """

    metric: str
    runs: tuple[RunScores, ...]
    labels: tuple[int, ...] | None = field(default=None, repr=False)
    names: tuple[str, ...] | None = field(default=None, repr=False)
    paths: tuple[Path | None, ...] | None = field(default=None, repr=False)
    classes: tuple[str, ...] | None = field(default=None, repr=False)
    data: Samples | None = field(default=None, repr=False, compare=False)
    """The samples, if they are those of files."""

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.runs[0].scores)

    @property
    def unit(self) -> str:
        """ "%" for top1 and top5, else empty."""
        return "" if self.labels is None else "%"

    def __getitem__(self, name: str) -> RunScores:
        for run in self.runs:
            if run.name == name:
                return run
        raise KeyError(name)

    def changed(self, name: str) -> tuple[ChangedSample, ...]:
        """Returns the samples that changed sides between the first run and the run `name`, in their order.

        Raises `OptionError` for a metric that is a function, which does not tell right from wrong.
        """
        return tuple(self._changes(self[name]))

    def lost(self, name: str) -> tuple[ChangedSample, ...]:
        """Returns the samples that are right in the first run and wrong in the run `name`."""
        return tuple(sample for sample in self.changed(name) if sample.is_lost)

    def gained(self, name: str) -> tuple[ChangedSample, ...]:
        """Returns the samples that are wrong in the first run and right in the run `name`."""
        return tuple(sample for sample in self.changed(name) if not sample.is_lost)

    def _changes(self, run: RunScores) -> Iterator[ChangedSample]:
        first = self.runs[0]
        if self.labels is None or first.predictions is None or run.predictions is None:
            raise OptionError(f"The metric '{self.metric}' does not tell whether a sample is right. Use top1 or top5.")
        for index, (before, after) in enumerate(zip(first.scores, run.scores, strict=True)):
            if before == after:
                continue
            yield ChangedSample(
                index,
                self.names[index] if self.names else f"sample {index}",
                self.paths[index] if self.paths else None,
                self.labels[index],
                first.predictions[index],
                run.predictions[index],
                before == RIGHT,
            )

    def inputs_of(self, index: int) -> Any:
        """Reads the inputs of a sample again, without a transform: an image, pixels, ... None without `data`.

        Raises `InputError` for a file that cannot be read any more.
        """
        return None if self.data is None else self.data.with_transform(None)[index].inputs

    def class_name(self, index: int) -> str:
        """Returns the name of a class; its index if the data do not name it."""
        return self.classes[index] if self.classes and index < len(self.classes) else str(index)

    def as_dict(self) -> dict[str, Any]:
        """Returns the results as values that JSON has, without the scores of single samples.

        Infinite numbers and NaN become None.
        """
        found: dict[str, Any] = without_infinite_numbers({
            "metric": self.metric,
            "samples": self.samples,
            "unit": self.unit,
            "runs": [self._run_as_dict(run) for run in self.runs],
        })  # fmt: skip
        return found

    def _run_as_dict(self, run: RunScores) -> dict[str, Any]:
        found: dict[str, Any] = {"name": run.name, "value": run.value, "interval": run.interval}
        if self.labels is None:
            return found
        return {**found, "changed": [self._sample_as_dict(sample) for sample in self.changed(run.name)]}

    def _sample_as_dict(self, sample: ChangedSample) -> Mapping[str, Any]:
        return {
            "index": sample.index,
            "name": sample.name,
            "path": None if sample.path is None else str(sample.path),
            "label": self.class_name(sample.label),
            "before": self.class_name(sample.before),
            "after": self.class_name(sample.after),
            "is_lost": sample.is_lost,
        }

    def __str__(self) -> str:
        lines = [f"{self.metric} on {self.samples} samples"]
        width = max(len(run.name) for run in self.runs)
        for run in self.runs:
            interval = "" if run.interval is None else "  ({} to {})".format(*map(self._text, run.interval))
            value = f"{self._text(run.value)} {self.unit}".rstrip()
            lines.append(f"  {run.name:<{width}}  {value}{interval}{self._sides(run)}")
        return "\n".join(lines)

    def _text(self, value: float) -> str:
        """Returns percentages with two digits after the point, and values of other metrics with four digits."""
        return f"{value:.2f}" if self.unit == "%" else f"{value:.4g}"

    def _sides(self, run: RunScores) -> str:
        if self.labels is None or run is self.runs[0]:
            return ""
        return f"  lost {len(self.lost(run.name))}, gained {len(self.gained(run.name))}"

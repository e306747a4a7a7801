"""Makes the accuracy rows of a summary from the results of `evaluate_side_by_side`, with thumbnails of images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from openneutron.core.messages import printable
from openneutron.data.images import thumbnail
from openneutron.page.content import AccuracyRow, SampleRow, finite
from openneutron.results.side_by_side import RunScores, SideBySide

__all__ = ["MOST_PICTURES", "accuracy_rows"]

MOST_PICTURES = 24
"""Number of changed samples of the last run that have a thumbnail, lost ones first."""


def accuracy_rows(results: SideBySide) -> tuple[AccuracyRow, ...]:
    """Returns a row for each run. The samples of the last run have thumbnails, where they are images.

    Raises `InputError` for an image file that cannot be read any more.
    """
    last = results.runs[-1]
    return tuple(_accuracy_row(results, run, shows=run is last) for run in results.runs)


def _accuracy_row(results: SideBySide, run: RunScores, *, shows: bool) -> AccuracyRow:
    interval = run.interval
    return AccuracyRow(
        name=run.name,
        value=finite(run.value),
        samples=len(run.scores),
        interval=None if interval is None or None in map(finite, interval) else interval,
        changed=_changed(results, run, shows=shows),
        metric=results.metric,
        unit=results.unit,
    )


def _changed(results: SideBySide, run: RunScores, *, shows: bool) -> tuple[SampleRow, ...]:
    if run is results.runs[0] or results.labels is None:
        return ()
    changed = results.changed(run.name)
    first = sorted(changed, key=lambda one: not one.is_lost)[:MOST_PICTURES] if shows else ()
    has_data = results.data is not None
    pictures = {one.index: thumbnail(results.inputs_of(one.index) if has_data else one.path) for one in first}
    root = _common_folder(results.paths or ())
    return tuple(
        SampleRow(
            name=printable(one.name if root is None or one.name != str(one.path) else _relative(one.path, root)),
            label=printable(results.class_name(one.label)),
            before=printable(results.class_name(one.before)),
            after=printable(results.class_name(one.after)),
            is_lost=one.is_lost,
            picture=pictures.get(one.index),
        )
        for one in changed
    )


def _relative(path: Path | None, root: Path) -> str:
    return "" if path is None else path.relative_to(root).as_posix()


def _common_folder(paths: Sequence[Path | None]) -> Path | None:
    """Returns the folder that has all files, so that names of samples do not depend on where the data are."""
    folders = {str(path.parent) for path in paths if path is not None}
    return Path(os.path.commonpath(folders)) if folders and None not in paths else None

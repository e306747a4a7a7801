"""The operators of the NPU as a table for spreadsheets."""

from __future__ import annotations

import csv
import io

from openneutron.page.content import LayerRow, Summary

__all__ = ["COLUMNS", "layers_as_csv"]

COLUMNS = (
    "position", "node", "operator", "module", "source", "delegate", "output_shape", "cycles", "macs",
    "utilization", "weight_bytes", "live_bytes", "sqnr_db", "error_share",
)  # fmt: skip
"""The columns. `cycles` are estimated; `utilization` and `error_share` are shares from 0 to 1."""


def layers_as_csv(summary: Summary) -> str:
    """Returns a CSV with a row for each operator of the NPU, in order of execution. What is unknown is empty.

    SQNR and share of the error are those of the layer with the operator's node, if the accuracy was analyzed.
    """
    analyzed = () if summary.analysis is None else summary.analysis.layers
    accuracy = {one.node: (one.sqnr_db, one.error_share) for one in analyzed}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for position, layer in enumerate(summary.layers):
        sqnr_db, error_share = accuracy.get(layer.node or "", (None, None))
        writer.writerow((position, *_values(layer), sqnr_db, error_share))
    return text.getvalue()


def _values(layer: LayerRow) -> tuple[object, ...]:
    shape = "x".join(map(str, layer.output_shape))
    return (
        layer.node, layer.operator, layer.module, layer.source, layer.delegate, shape, layer.cycles, layer.macs,
        layer.utilization, layer.weight_bytes, layer.live_bytes,
    )  # fmt: skip

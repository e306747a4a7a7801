"""Draws the charts of the page with Vega-Lite, as SVG whose colors are CSS variables of the page.

vl-convert runs Vega-Lite offline in this process. A chart has a narrow and a wide form, because the texts of a scaled
SVG would be too small on a phone or too large on a screen.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from openneutron.errors import OptionError
from openneutron.page.content import AnalysisRows, LayerAccuracyRow, LayerRow, RecurrentRow, Summary
from openneutron.page.headings import WEIGHTS_OF_TWO_LAYERS, resident_label
from openneutron.results.layerwise_accuracy import Bins

__all__ = [
    "BUSY_CLASSES",
    "Chart",
    "cycles_chart",
    "histogram_chart",
    "memory_chart",
    "shows_sram",
    "sqnr_chart",
    "steps_chart",
    "tensors_chart",
]

NARROW, WIDE = 350, 900
_FONT_SIZES = {NARROW: 12, WIDE: 13}
"""The wide form is shrunk on screens from 700 px, so its texts are larger."""
_HISTOGRAM = (300, 150)
_FONT = "system-ui, sans-serif"
MOST_BARS = 160
"""Charts with more operators show groups of consecutive operators, so that a bar is wide enough to be seen."""
MOST_POINTS = 480
"""Areas with more points show groups of consecutive ones: their largest memory."""
MOST_POINTS_OF_SQNR = {NARROW: 60, WIDE: 180}
"""The SQNR of neighbouring layers differs much, so that more points would be a tangle of lines."""
MOST_TENSORS = 250
"""The chart of the arena shows the largest tensors, at most so many."""

MOST_NAMED = 6
"""The largest count of whole numbers that an axis names one by one."""

BUSY_CLASSES = (("under 5 %", 0.05), ("5 to 20 %", 0.2), ("20 to 50 %", 0.5), ("over 50 %", math.inf))
"""Classes of the busy share of the array of multipliers: their names and upper limits."""
_BUSY_COLORS = [f"var(--busy-{number})" for number in range(len(BUSY_CLASSES))]
_OTHER, _OTHER_COLOR = "other", "var(--weights)"
"""The class and the color of operators that compute no products, which need the array for little or nothing."""
_PRODUCTS = frozenset({"convolution", "depthwise", "transposed_convolution", "matrix_product", ""})
"""The kinds of work that the array is made for: names of `ir.kinds.Work`, and "" for an unknown kind."""

_CONFIG = {
    "background": "transparent",
    "font": _FONT,
    "aria": False,
    "view": {"stroke": None},
}
_AXIS = {
    "labelColor": "var(--soft)", "titleColor": "var(--soft)", "gridColor": "var(--grid)", "domainColor": "var(--soft)",
    "tickColor": "var(--soft)", "titleFontWeight": "normal", "titlePadding": 6, "labelOverlap": True,
}  # fmt: skip


@dataclass(frozen=True)
class Chart:
    """A chart as SVG in two forms, and its content in words for readers without eyes."""

    label: str
    narrow: str
    wide: str
    note: str = ""
    """What a reader must know to read the chart; empty if there is nothing."""


def memory_chart(summary: Summary) -> Chart:
    """Draws the bytes in SRAM at each operator of the NPU: tensors alive, rest of arena, runtime, resident bytes."""
    layers, memory = summary.layers, summary.memory
    weights = _weights_in_sram(summary)
    largest = max([memory.needed_bytes, *(map(sum, zip(weights, [memory.scratch_bytes] * len(layers), strict=True)))])
    limit = summary.target.sram_bytes if shows_sram(summary) else None
    factor, unit = _unit(max(largest, limit or 0))
    parts = {
        "0": [layer.live_bytes for layer in layers],
        "1": [max(0, memory.scratch_bytes - layer.live_bytes) for layer in layers],
        "2": [memory.runtime_bytes] * len(layers),
        "3": weights,
    }
    size = _group_size(len(layers), MOST_POINTS)
    peaks = _peaks([layer.live_bytes + own for layer, own in zip(layers, weights, strict=True)], size)
    rows = [
        {"i": start - 0.5, "part": part, "bytes": sizes[peak] / factor}
        for part, sizes in parts.items()
        for start, peak in [*peaks.items(), (len(layers), peaks[max(peaks)])]
    ]
    colors = ["var(--alive)", "var(--arena)", "var(--runtime)", "var(--weights)"]
    areas = {
        "data": {"values": rows},
        "mark": {"type": "area", "interpolate": "step-after"},
        "encoding": {
            "x": _operators("i", len(layers)),
            "y": {"field": "bytes", "type": "quantitative", "stack": "zero", "title": unit},
            "order": {"field": "part"},
            "color": _colors("part", list(parts), colors),
        },
    }
    label = f"Memory at each of {len(layers)} operators, in {unit}."
    return _chart(label, 200, [areas, *([] if limit is None else [_rule("y", limit / factor)])])


def _group_size(count: int, most: int) -> int:
    return max(1, -(-count // most))


def _peaks(values: Sequence[float], size: int) -> dict[int, int]:
    """Returns the index of the largest value of each group of `size` consecutive values, by the group's start."""
    starts = range(0, len(values), size)
    return {start: max(range(start, min(start + size, len(values))), key=values.__getitem__) for start in starts}


def shows_sram(summary: Summary) -> bool:
    """Whether the chart of memory has a line for the target's SRAM: its scale must not be much larger than the need."""
    sram = summary.target.sram_bytes
    return sram is not None and sram <= 2.5 * summary.memory.needed_bytes


def _weights_in_sram(summary: Summary) -> list[int]:
    """Returns the bytes in SRAM at each operator, without arena and runtime: those that are resident for the whole run,
    or the weights of this and the next layer.
    """
    sizes = [layer.weight_bytes for layer in summary.layers]
    if resident_label(summary.memory) != WEIGHTS_OF_TWO_LAYERS:
        return [summary.memory.resident_bytes] * len(sizes)
    following = [0] * len(sizes)
    after = 0
    for number in reversed(range(len(sizes))):
        following[number], after = after, sizes[number] or after
    return [own + after for own, after in zip(sizes, following, strict=True)]


def tensors_chart(summary: Summary) -> Chart | None:
    """Draws the arena of intermediate tensors: each tensor at its offset, while it is needed. None without tensors."""
    tensors = sorted(summary.memory.tensors, key=lambda one: -one.bytes)[:MOST_TENSORS]
    if not tensors:
        return None
    factor, unit = _unit(max(one.offset + one.bytes for one in tensors))
    rows = [
        {
            "first": one.first - 0.5,
            "end": one.last + 0.5,
            "low": one.offset / factor,
            "high": (one.offset + one.bytes) / factor,
        }
        for one in tensors
    ]
    rectangles = {
        "data": {"values": rows},
        "mark": {"type": "rect", "color": "var(--alive)", "stroke": "var(--card)", "strokeWidth": 1},
        "encoding": {
            "x": _operators("first", len(summary.layers)),
            "x2": {"field": "end"},
            "y": {"field": "low", "type": "quantitative", "title": f"offset in the arena, {unit}"},
            "y2": {"field": "high"},
        },
    }
    starts = [number for number, pair in enumerate(pairwise(summary.layers), 1) if pair[0].delegate != pair[1].delegate]
    rules = [_rule("x", start - 0.5) for start in starts[:MOST_BARS]]
    return _chart(f"The arena: {len(tensors)} tensors at their offsets.", 240, [rectangles, *rules])


def cycles_chart(layers: Sequence[LayerRow]) -> Chart | None:
    """Draws the estimated cycles of each operator. Returns None without operators.

    Operators that compute products are colored by the busy share of the array. A bar of several operators has the color
    of those that take most of its cycles.
    """
    groups = list(_groups(layers))
    if not groups:
        return None
    factor, unit = _scaled(max(sum(layer.cycles for layer in group) for group in groups))
    size = len(groups[0])
    rows = []
    for number, group in enumerate(groups):
        cycles = sum(layer.cycles for layer in group)
        products = [layer for layer in group if layer.work in _PRODUCTS]
        of_products = sum(layer.cycles for layer in products)
        busy = sum(layer.cycles * layer.utilization for layer in products) / max(1, of_products)
        start = number * size - 0.5
        rows.append({
            "i": start + 0.1 * size, "end": start + 0.9 * size, "low": 0, "cycles": cycles / factor,
            "busy": str(busy_class(busy)) if 2 * of_products > cycles else _OTHER,
        })  # fmt: skip
    bars = {
        "data": {"values": rows},
        "mark": {"type": "rect"},
        "encoding": {
            "x": _operators("i", len(layers)),
            "x2": {"field": "end"},
            "y": {"field": "low", "type": "quantitative", "title": f"cycles{unit}"},
            "y2": {"field": "cycles"},
            "color": _colors("busy", [*map(str, range(len(BUSY_CLASSES))), _OTHER], [*_BUSY_COLORS, _OTHER_COLOR]),
        },
    }
    return _chart(f"Estimated cycles of {len(layers)} operators of the NPU.", 220, [bars])


def busy_class(share: float) -> int:
    """Returns the index in `BUSY_CLASSES` of a busy share from 0 to 1."""
    return next(number for number, (_, limit) in enumerate(BUSY_CLASSES) if share < limit)


def _groups(layers: Sequence[LayerRow]) -> Iterator[Sequence[LayerRow]]:
    size = _group_size(len(layers), MOST_BARS)
    for start in range(0, len(layers), size):
        yield layers[start : start + size]


def sqnr_chart(analysis: AnalysisRows) -> Chart | None:
    """Draws the SQNR of each layer's output along the network. None without a layer that has any error.

    Lines: with the noise of all layers before it, with only weights quantized, with only activations quantized. Points:
    with only its own noise. The line of activations is dashed and above the first line, which it often equals.
    """
    layers = sorted(analysis.layers, key=lambda layer: layer.position)
    names = ("own_sqnr_db", "sqnr_db", "weights_sqnr_db", "activations_sqnr_db")
    if not any(getattr(layer, name) is not None for layer in layers for name in names):
        return None
    narrow, wide = (
        _svg(width, 240, _sqnr_marks(analysis, layers, most)) for width, most in MOST_POINTS_OF_SQNR.items()
    )
    note = " Of neighbouring layers, the lowest value is shown." if len(layers) > MOST_POINTS_OF_SQNR[NARROW] else ""
    return Chart(f"SQNR of {len(layers)} layers in dB, in the order of the network.", narrow, wide, note)


def _sqnr_marks(analysis: AnalysisRows, layers: Sequence[LayerAccuracyRow], most: int) -> list[dict[str, Any]]:
    """Returns the lines, points and rings of `sqnr_chart`, with at most `most` points in each."""
    lines = {
        "all": (list(_points(layers, "sqnr_db", most)), "var(--alive)"),
        "weights": (list(_points(layers, "weights_sqnr_db", most)), "var(--weights)"),
        "activations": (list(_points(layers, "activations_sqnr_db", most)), "var(--runtime)"),
    }
    dashes = {"activations": {"strokeDash": [6, 6]}}
    x = _numbers("i", "layer of the network", [0, max(1, len(layers) - 1)])
    y = {"field": "db", "type": "quantitative", "title": "SQNR, dB", "scale": {"zero": False}}
    marks = [
        {
            "data": {"values": points},
            "mark": {
                "type": "line",
                "color": color,
                "strokeWidth": 1.5 if name == "weights" else 2.5,
                **dashes.get(name, {}),
            },
            "encoding": {"x": x, "y": y},
        }
        for name, (points, color) in lines.items()
    ]
    points = {
        "data": {"values": list(_points(layers, "own_sqnr_db", most))},
        "mark": {"type": "point", "color": "var(--soft)", "filled": True, "size": 14, "opacity": 1},
        "encoding": {"x": x, "y": y},
    }
    worst = [
        {"i": layer.position, "db": layer.sqnr_db, "name": f"layer {layer.position}"} for layer in _marked(analysis)
    ]
    rings = {
        "data": {"values": worst},
        "mark": {"type": "point", "color": "var(--bad)", "filled": False, "size": 90, "strokeWidth": 2, "opacity": 1},
        "encoding": {"x": x, "y": y},
    }
    return [*marks, points, rings]


def steps_chart(loop: RecurrentRow) -> Chart | None:
    """Draws the SQNR of each step of a recurrent layer. None without a step that has any error."""
    points = [{"i": step, "db": value} for step, value in enumerate(loop.step_sqnr_db, 1) if value is not None]
    if not points:
        return None
    line = {
        "data": {"values": points},
        "mark": {"type": "line", "color": "var(--alive)", "strokeWidth": 2, "point": {"color": "var(--alive)"}},
        "encoding": {
            "x": _numbers("i", "step", [1, max(2, loop.steps)]),
            "y": {"field": "db", "type": "quantitative", "title": "SQNR, dB", "scale": {"zero": False}},
        },
    }
    return _chart(f"SQNR in dB of {loop.steps} steps of the recurrent layer {loop.name}.", 160, [line])


def _marked(analysis: AnalysisRows) -> list[LayerAccuracyRow]:
    """Returns the layers to treat, which the chart marks."""
    named = {one.node for one in analysis.advice}
    return [layer for layer in analysis.layers if layer.node in named and layer.sqnr_db is not None]


def _points(layers: Sequence[LayerAccuracyRow], name: str, most: int) -> Iterator[dict[str, float]]:
    """Returns at most `most` points of a line. Keeps the lowest value of each group of consecutive layers."""
    size = _group_size(len(layers), most)
    for start in range(0, len(layers), size):
        known = [
            (value, layer.position)
            for layer in layers[start : start + size]
            if (value := getattr(layer, name)) is not None
        ]
        if known:
            value, position = min(known)
            yield {"i": position, "db": value}


_SHORT_NUMBER = "format(datum.value, datum.value && abs(datum.value) < 0.001 ? '.3~e' : '.6~g')"


def histogram_chart(layer: LayerAccuracyRow, bins: Bins) -> str:
    """Draws the counts of float values as an area, and those of int8 values as a line, on a logarithmic scale."""
    width = (bins.high - bins.low) / len(bins.reference)
    floor = 0.5  # a count of 0 has no logarithm

    def steps(counts: Sequence[int]) -> list[dict[str, float]]:
        values = [max(floor, count) for count in counts]
        return [{"x": bins.low + i * width, "y": value} for i, value in enumerate([*values, values[-1]])]

    top = max(1, *bins.reference, *bins.quantized)
    ticks = [10**power for power in range(0, int(math.log10(top)) + 1)]
    step = max(1, -(-len(ticks) // 4))
    x = {
        "field": "x", "type": "quantitative", "title": None, "scale": {"zero": False, "nice": False},
        "axis": {"tickCount": 4, "grid": False, "labelExpr": _SHORT_NUMBER},
    }  # fmt: skip
    y = {
        "field": "y", "type": "quantitative", "title": None, "scale": {"type": "log", "domain": [floor, 2 * top]},
        "axis": {"values": ticks[::step], "format": "~s"},
    }  # fmt: skip
    area = {
        "data": {"values": [{**point, "base": floor} for point in steps(bins.reference)]},
        "mark": {"type": "area", "interpolate": "step-after", "color": "var(--float-area)"},
        "encoding": {"x": x, "y": y, "y2": {"field": "base"}},
    }
    line = {
        "data": {"values": steps(bins.quantized)},
        "mark": {"type": "line", "interpolate": "step-after", "color": "var(--alive)", "strokeWidth": 1.5},
        "encoding": {"x": x, "y": y},
    }
    ends = [_rule("x", end) for end in layer.int8_range if bins.low + width / 2 < end < bins.high - width / 2]
    return _svg(*_HISTOGRAM, [area, line, *ends])


def _numbers(name: str, title: str, domain: Sequence[float]) -> dict[str, Any]:
    """Returns an axis of whole numbers. Few of them are all named, because Vega-Lite would also name fractions."""
    first, last = math.ceil(domain[0]), math.floor(domain[1])
    named = {"values": list(range(first, last + 1))} if last - first < MOST_NAMED else {"tickMinStep": 1}
    return {
        "field": name, "type": "quantitative", "title": title,
        "scale": {"domain": list(domain), "nice": False, "zero": False},
        "axis": {**named, "grid": False, "format": ",d"},
    }  # fmt: skip


def _operators(name: str, count: int) -> dict[str, Any]:
    """Returns the axis of `count` operators.

    The number of operator i is at its middle: it lies from i - 0.5 to i + 0.5.
    """
    return _numbers(name, "operator of the NPU", [-0.5, count - 0.5])


def _colors(name: str, domain: Sequence[str], colors: Sequence[str]) -> dict[str, Any]:
    scale = {"domain": list(domain), "range": list(colors)}
    return {"field": name, "type": "nominal", "scale": scale, "legend": None}


def _rule(axis: str, value: float) -> dict[str, Any]:
    return {
        "data": {"values": [{}]},
        "mark": {"type": "rule", "color": "var(--bad)" if axis == "y" else "var(--soft)", "strokeDash": [5, 4]},
        "encoding": {axis: {"datum": value}},
    }


def _unit(size: float) -> tuple[int, str]:
    return next(
        ((factor, name) for name, factor in (("MiB", 1 << 20), ("KiB", 1 << 10)) if size >= factor), (1, "bytes")
    )


def _scaled(value: float) -> tuple[int, str]:
    """Returns a power of 1000 that `value` reaches, and a text that names it."""
    scales = ((10**6, " in millions"), (10**3, " in thousands"))
    return next(((factor, text) for factor, text in scales if value >= factor), (1, ""))


def _chart(label: str, height: int, layers: Sequence[Mapping[str, Any]]) -> Chart:
    return Chart(label, _svg(NARROW, height, layers), _svg(WIDE, height, layers))


def _svg(width: int, height: int, layers: Sequence[Mapping[str, Any]]) -> str:
    try:
        import vl_convert
    except ImportError as error:
        raise OptionError(
            "The charts of the page need vl-convert-python, which is not installed: pip install 'openneutron[report]'. "
            "summary.json does not need it."
        ) from error
    size = _FONT_SIZES.get(width, 12)
    axis = {**_AXIS, "labelFontSize": size, "titleFontSize": size}
    spec = {
        "width": width, "height": height, "autosize": {"type": "fit", "contains": "padding"}, "padding": 2,
        "config": {**_CONFIG, "axis": axis, "axisX": {"tickCount": width // 70}}, "layer": list(layers),
    }  # fmt: skip
    svg = vl_convert.vegalite_to_svg(json.dumps(spec))
    return _without_extras(svg, width, height)


_UNUSED = re.compile(
    r' xmlns:xlink="[^"]*"| version="1\.1"| class="[^"]*"| pointer-events="none"| stroke-miterlimit="10"'
    r'| opacity="1"'
)


_DIGITS = re.compile(r"(\.\d\d)\d+")


def _without_extras(svg: str, width: int, height: int) -> str:
    """Removes attributes without effect in the page, digits below 0.01 px, and the fixed size: the page scales it."""
    svg = re.sub(r'<path[^>]*display="none"[^>]*/>', "", svg)
    svg = re.sub(r'<path[^>]* d="M0,0h0v0h0Z"[^>]*/>', "", svg)
    svg = re.sub(r"<[^>]*>", lambda tag: _DIGITS.sub(r"\1", tag[0]), svg)  # texts keep their digits
    svg = re.sub(r'(<svg[^>]*?) width="\d+" height="\d+"', r"\1", _UNUSED.sub("", svg), count=1)
    return svg.replace("<svg", f'<svg data-width="{width}" data-height="{height}" aria-hidden="true"', 1)

"""Writes an analysis of accuracy as a self-contained HTML page with plots."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from openneutron.accuracy.text import HEADINGS, cells_of, comparison_lines
from openneutron.errors import OptionError

if TYPE_CHECKING:
    from openneutron.accuracy.compare import Comparison
    from openneutron.accuracy.result import Analysis, LayerAccuracy

__all__ = ["page_of"]

WORST = 6
_FLOAT, _INT8, _RED = "#4269d0", "#ff725c", "#c0392b"

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>OpenNeutron: accuracy by layer</title>
<style>
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1280px; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin: 2em 0 .3em; }
.verdict { font-size: 1.1em; }
.advice { border-left: 4px solid #c0392b; padding: .1em 1em; margin: 1em 0; background: #faf6f5; }
code { background: #eee; padding: .1em .35em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; white-space: nowrap; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: right; }
th { position: sticky; top: 0; background: #fff; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
.note { color: #666; }
</style>
<script>{{ library | safe }}</script>
</head>
<body>
<h1>Accuracy by layer</h1>
<p class="verdict">{{ analysis.verdict }}</p>
{% for one in analysis.advice %}
<div class="advice">
<p><b>{{ one.node }}</b>{% if one.module %} (module {{ one.module }}){% endif %}: {{ one.why }}</p>
<p>{{ one.what }}{% if one.error_reduction is not none %} Tried on the samples, it removes
{{ "%.0f" | format(100 * one.error_reduction) }} % of the error.{% endif %}</p>
{% if one.code %}<p><code>quantize(..., {{ one.code }})</code></p>{% endif %}
</div>
{% endfor %}
{% for line in compared %}<p>{{ line }}</p>{% endfor %}
{% for title, note, plot in plots %}
<h2>{{ title }}</h2>
<p class="note">{{ note }}</p>
{{ plot | safe }}
{% endfor %}
<h2>All layers</h2>
<p class="note">{{ analysis.samples }} samples; shares of the error were measured on {{ analysis.share_samples }} of
them. They need not add up to 100 %. A share is below 0 if the layer's error cancels the error of another layer.</p>
<div class="wide"><table>
<tr>{% for heading in headings %}<th>{{ heading }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
</body>
</html>
"""


def page_of(analysis: Analysis) -> str:
    """Returns the page, which contains plotly's script. Raises `OptionError` if plotly or jinja2 is not installed."""
    try:
        import jinja2
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise OptionError(
            f"Pages need {error.name}, which is not installed: pip install 'openneutron[report]'. table() and "
            "to_json() do not need it."
        ) from error
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_PAGE)
    return template.render(
        analysis=analysis,
        library=get_plotlyjs(),
        compared=[] if analysis.comparison is None else list(comparison_lines(analysis.comparison)),
        plots=[(title, note, _html(figure)) for title, note, figure in _plots(analysis)],
        headings=HEADINGS,
        rows=[cells_of(layer) for layer in analysis.layers],
    )


def _html(figure: Any) -> str:
    text: str = figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False})
    return text


def _plots(analysis: Analysis) -> Iterator[tuple[str, str, Any]]:
    """Returns title, explanation and figure of each plot."""
    yield (
        "Along the network",
        "SQNR of each layer's output, with the noise of all layers before it, and with only its own noise. Bars show "
        "the share of the final error that disappears if this layer is in float.",
        _sqnr_by_layer(sorted(analysis.layers, key=lambda layer: layer.position)),
    )
    worst = analysis.layers[:WORST]
    yield (
        "Outputs of the worst layers",
        "Float values and dequantized int8 values in 64 bins, on a logarithmic scale. Dotted lines mark the range of "
        "int8.",
        _histograms(worst),
    )
    weighted = [layer for layer in worst if layer.largest_codes]
    if weighted:
        yield (
            "Weights of the worst layers",
            "The largest code of each output channel (at most 127), sorted. A channel below the line uses fewer than 8 "
            "codes.",
            _channels(weighted),
        )
    if analysis.comparison is not None and analysis.comparison.layers:
        yield (
            "Differences between .pte and module",
            "The largest difference of each layer on equal inputs, in int8 steps. Red bars exceed the operator's "
            "tolerance.",
            _differences(analysis.comparison),
        )


def _sqnr_by_layer(layers: Sequence[LayerAccuracy]) -> Any:
    from plotly.graph_objects import Bar, Figure, Scatter

    names = [_layer_name(layer) for layer in layers]
    shares = [None if layer.error_share is None else 100 * layer.error_share for layer in layers]
    figure = Figure(
        [
            Bar(x=names, y=shares, name="share of error, %", marker_color="#c9ced6", yaxis="y2"),
            Scatter(x=names, y=_finite(layer.sqnr_db for layer in layers), name="SQNR", mode="lines+markers"),
            Scatter(x=names, y=_finite(layer.own_sqnr_db for layer in layers), name="its own", mode="markers"),
        ]
    )
    figure.update_layout(
        height=480,
        template="plotly_white",
        margin={"t": 50},
        legend={"orientation": "h", "y": 1.12},
        xaxis={"tickangle": -60},
        yaxis={"title": "SQNR, dB", "overlaying": "y2", "tickmode": "auto"},
        yaxis2={"title": "share of error, %", "side": "right", "showgrid": False, "tickmode": "auto"},
    )
    return figure


def _histograms(layers: Sequence[LayerAccuracy]) -> Any:
    from plotly.graph_objects import Bar

    figure = _grid([_layer_name(layer) for layer in layers])
    for number, layer in enumerate(layers):
        bins, (row, column) = layer.histogram, _grid_cell(number)
        width = (bins.high - bins.low) / len(bins.reference)
        middles = [bins.low + (index + 0.5) * width for index in range(len(bins.reference))]
        for name, counts, color in (("float", bins.reference, _FLOAT), ("int8", bins.quantized, _INT8)):
            bar = Bar(
                x=middles, y=counts, width=width, name=name, marker_color=color, opacity=0.6, legendgroup=name,
                showlegend=number == 0,
            )  # fmt: skip
            figure.add_trace(bar, row=row, col=column)
        for end in layer.int8_range:
            figure.add_vline(x=end, line_dash="dot", line_color="#888", row=row, col=column)
    figure.update_layout(barmode="overlay", bargap=0)
    figure.update_yaxes(type="log")
    return figure


def _channels(layers: Sequence[LayerAccuracy]) -> Any:
    from plotly.graph_objects import Scatter

    figure = _grid([_layer_name(layer) for layer in layers])
    for number, layer in enumerate(layers):
        row, column = _grid_cell(number)
        codes = sorted(layer.largest_codes, reverse=True)
        steps = Scatter(y=codes, fill="tozeroy", line={"shape": "hv", "color": _FLOAT, "width": 1}, showlegend=False)
        figure.add_trace(steps, row=row, col=column)
        figure.add_hline(y=3.5, line_color=_RED, line_width=1, row=row, col=column)
    figure.update_yaxes(range=[0, 128])
    return figure


def _differences(comparison: Comparison) -> Any:
    from plotly.graph_objects import Bar, Figure

    layers = comparison.layers
    colors = [_RED if layer.is_beyond else _FLOAT for layer in layers]
    names = [f"{layer.node} ({layer.module})" if layer.module else layer.node for layer in layers]
    figure = Figure([Bar(x=names, y=[layer.lsb for layer in layers], marker_color=colors)])
    figure.update_layout(
        template="plotly_white", height=380, margin={"t": 20}, xaxis={"tickangle": -60}, yaxis={"title": "LSB"}
    )
    return figure


def _grid(titles: Sequence[str]) -> Any:
    from plotly.subplots import make_subplots

    rows = math.ceil(len(titles) / 3)
    figure = make_subplots(rows, 3, subplot_titles=titles, vertical_spacing=0.3 / rows)
    figure.update_annotations(font_size=12)
    figure.update_layout(template="plotly_white", height=60 + 260 * rows, margin={"t": 40})
    return figure


def _grid_cell(number: int) -> tuple[int, int]:
    return number // 3 + 1, number % 3 + 1


def _layer_name(layer: LayerAccuracy) -> str:
    return f"{layer.node} ({layer.module})" if layer.module else layer.node


def _finite(values: Iterator[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]

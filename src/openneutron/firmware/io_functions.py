"""Writes `model_io.h`: functions that convert between the values of an application and those of the program."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from openneutron.firmware.config import c_float
from openneutron.firmware.ports import Port
from openneutron.firmware.templates import filled

__all__ = ["io_contents", "io_header"]

_QUANTIZE = """\
/* Quantizes {kind} {index}: value / scale, rounded to even, + zero point, limited to {low}..{high}; NaN gives {low}.
   Multiplies by 1 / scale, as ExecuTorch does, so that the codes are equal to those of the host. */
static inline void {name}_quantize_{kind}{index}(const float *values, {type} *codes) {{
  for (size_t i = 0; i < {macro}_ELEMENTS; ++i) {{
    const float code = rintf(values[i] * {inverse}) + (float){macro}_ZERO_POINT;
    codes[i] = ({type})(code >= {low}.0f ? (code < {high}.0f ? code : {high}.0f) : {low}.0f);
  }}
}}"""

_DEQUANTIZE = """\
/* Dequantizes {kind} {index}: (code - zero point) * scale. */
static inline void {name}_dequantize_{kind}{index}(const {type} *codes, float *values) {{
  for (size_t i = 0; i < {macro}_ELEMENTS; ++i) {{
    values[i] = (float)((int32_t)codes[i] - {macro}_ZERO_POINT) * {macro}_SCALE;
  }}
}}"""

_TO_LAST = """\
/* Converts {kind} {index} from the order of its shape (channels first) to the program's order (channels last). */
static inline void {name}_{kind}{index}_to_channels_last(const {type} *first, {type} *last) {{
  for (size_t n = 0; n < {batch}u; ++n) {{
    for (size_t c = 0; c < {channels}u; ++c) {{
      for (size_t i = 0; i < {spatial}u; ++i) {{
        last[(n * {spatial}u + i) * {channels}u + c] = first[(n * {channels}u + c) * {spatial}u + i];
      }}
    }}
  }}
}}"""

_TO_FIRST = """\
/* Converts {kind} {index} from the program's order (channels last) to the order of its shape (channels first). */
static inline void {name}_{kind}{index}_to_channels_first(const {type} *last, {type} *first) {{
  for (size_t n = 0; n < {batch}u; ++n) {{
    for (size_t c = 0; c < {channels}u; ++c) {{
      for (size_t i = 0; i < {spatial}u; ++i) {{
        first[(n * {channels}u + c) * {spatial}u + i] = last[(n * {spatial}u + i) * {channels}u + c];
      }}
    }}
  }}
}}"""

_SCORES = """\
/* Returns the index of the largest score of output {index}; the first of several. */
static inline size_t {name}_argmax_output{index}(const {type} *scores) {{
  size_t best = 0;
  for (size_t i = 1; i < {macro}_ELEMENTS; ++i) {{
    best = scores[i] > scores[best] ? i : best;
  }}
  return best;
}}

/* Writes the indices of the `count` largest scores of output {index}, the largest first; of equal ones, the first. */
static inline void {name}_top_k_output{index}(const {type} *scores, size_t count, size_t *indices) {{
  size_t found = 0;
  for (size_t i = 0; i < {macro}_ELEMENTS; ++i) {{
    size_t at = found < count ? found++ : count;
    for (; at > 0 && scores[i] > scores[indices[at - 1]]; --at) {{
      if (at < count) {{
        indices[at] = indices[at - 1];
      }}
    }}
    if (at < count) {{
      indices[at] = i;
    }}
  }}
}}

/* Writes the softmax of the scores of output {index}. Use it where the network ends without one. */
static inline void {name}_softmax_output{index}(const {type} *scores, float *probabilities) {{
  const {type} largest = scores[{name}_argmax_output{index}(scores)];
  float sum = 0.0f;
  for (size_t i = 0; i < {macro}_ELEMENTS; ++i) {{
    probabilities[i] = expf({difference});
    sum += probabilities[i];
  }}
  for (size_t i = 0; i < {macro}_ELEMENTS; ++i) {{
    probabilities[i] /= sum;
  }}
}}"""


_PURPOSES = {
    "_quantize_": "quantize inputs",
    "_dequantize_": "dequantize outputs",
    "_to_channels_": "reorder values",
    "_argmax_": "find the largest scores and compute softmax",
}
"""What functions with a part of a name do."""


def io_contents(inputs: Sequence[Port], outputs: Sequence[Port]) -> str:
    """Returns what the functions of the header do, for the README.md of a package."""
    functions = "".join(_all_functions("", inputs, outputs))
    purposes = [purpose for part, purpose in _PURPOSES.items() if part in functions]
    return f"functions that {', '.join(purposes)}" if purposes else "no functions: no value needs a conversion"


def io_header(title: str, name: str, inputs: Sequence[Port], outputs: Sequence[Port]) -> str:
    """Returns the text of the header."""
    text = "\n\n".join(_all_functions(name, inputs, outputs)) or "/* No input or output needs a conversion. */"
    return filled("model_io.h", title=title, NAME=name.upper(), name=name, functions=text)


def _all_functions(name: str, inputs: Sequence[Port], outputs: Sequence[Port]) -> Iterator[str]:
    for kind, ports in (("input", inputs), ("output", outputs)):
        for index, port in enumerate(ports):
            yield from _functions(name, kind, index, port)


def _functions(name: str, kind: str, index: int, port: Port) -> Iterator[str]:
    """Returns the functions of one input or output."""
    if port.dtype is None or not port.elements:
        return
    values = {
        "name": name,
        "kind": kind,
        "index": index,
        "type": port.c_type,
        "macro": f"{name.upper()}_{kind.upper()}_{index}",
    }
    if port.scale is not None and port.zero_point is not None:
        limits = torch.iinfo(getattr(torch, port.dtype))
        values |= {
            "inverse": c_float(1 / port.scale),
            "low": limits.min,
            "high": limits.max,
        }
        if kind == "output":
            yield _DEQUANTIZE.format(**values)
        elif port.dtype != "int32":  # float32 has fewer digits than its codes
            yield _QUANTIZE.format(**values)
    if port.is_channels_last:
        batch, channels = port.shape[:2]
        values |= {"batch": batch, "channels": channels, "spatial": port.elements // (batch * channels)}
        yield (_TO_LAST if kind == "input" else _TO_FIRST).format(**values)
    if kind == "output" and port.c_type not in ("bool", "uint16_t", "int64_t") and _is_scores(port):
        difference = "scores[i] - largest"
        if port.scale is not None:
            difference = f"(float)((int32_t)scores[i] - (int32_t)largest) * {values['macro']}_SCALE"
        elif port.c_type == "int32_t":
            difference = "(float)scores[i] - (float)largest"  # the difference of the integers may overflow
        elif port.c_type != "float":
            difference = f"(float)({difference})"
        yield _SCORES.format(difference=difference, **values)


def _is_scores(port: Port) -> bool:
    """Whether an output is one row of at least two scores."""
    return port.elements > 1 and max(port.shape) == port.elements

"""Seconds that the report of MobileNetV2 takes beyond the analysis: `python -m benchmarks.report [SIZE]`.

Prints wall and CPU seconds of `summarize` and of `page_of`, and the size of the page. The first call imports the
packages of the page, as in a build; the second does not. The limit is 3 seconds.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.workloads import mobilenet_v2

from openneutron import lower, quantize
from openneutron.accuracy import analyze
from openneutron.page import page_of, summarize

SIZE = 96
"""The height and width of the images, in pixels."""


def measured(name: str, call: Callable[[], Any]) -> Any:
    wall, cpu = time.perf_counter(), time.process_time()
    found = call()
    print(f"{name:<24}{time.perf_counter() - wall:8.2f} s wall{time.process_time() - cpu:8.2f} s CPU")
    return found


def main(size: int = SIZE) -> None:
    torch.manual_seed(0)
    model, source = mobilenet_v2()
    images = [torch.randn(1, 3, size, size) for _ in range(4)]
    quantized = quantize(model.eval(), (images[0],), images, recover=None, progress=False)
    program = lower(quantized)
    found = measured("analysis", lambda: analyze(None, quantized, images[:1], program=program))
    print(f"MobileNetV2 of {source}, {size} x {size} pixels")
    for run in ("first", "second"):
        summary = measured(
            f"{run} summary", lambda: summarize("MobileNetV2", program, quantized=quantized, analysis=found)
        )
        page = measured(f"{run} page", functools.partial(page_of, summary))
    print(f"{len(page.encode()):,} bytes")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

"""Measures the time of `load` and of its checks: `python -m benchmarks.loading model.pte densenet121`.

An argument is a file, or the name of a network of `benchmarks.zoo`. Without arguments, it lowers two small networks.
Each row shows the size of the file in bytes, and the times in milliseconds of: `load`; the check of the program for
ExecuTorch's runtime, with the parse of the file, which `load` does once for all checks; the check of all TFLite models
for LiteRT; a run in this process; and a run in a separate process. Each time is the least of `REPEATS` measurements.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from openneutron import load, lower, quantize
from openneutron.cpu.signatures import signature_of
from openneutron.formats import payload, pte, pte_check, tflite

from .zoo import ZOO, smooth

REPEATS = 50


def main() -> None:
    """Prints the table of the files on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("programs", nargs="*", metavar="FILE_OR_NETWORK")
    programs = {name: _bytes_of(name) for name in parser.parse_args().programs} or _programs()
    table = Table("program", "bytes", "load", "check .pte", "check TFLite", "run", "isolated run")
    for name, data in programs.items():
        table.add_row(name, f"{len(data):,}", *(f"{1000 * value:.2f}" for value in _seconds(data)))
    Console().print(table)


def _bytes_of(name: str) -> bytes:
    if name not in ZOO:
        return Path(name).read_bytes()
    member = ZOO[name]
    images = smooth(member.small, 4, seed=1)
    return lower(quantize(member.build(member.small), (images[0],), images, recover=None)).buffer


def _seconds(data: bytes) -> tuple[float, ...]:
    calls = [call for method in pte.read(data).methods for call in method.delegates]
    payloads = [parsed for parsed in (payload.parse(call.payload) for call in calls) if parsed.is_portable]
    program, isolated = load(data), load(data, isolated=True)
    inputs = [torch.rand(info.shape).to(info.dtype) for info in program.inputs]

    return (
        _least(lambda: load(data)),
        _least(lambda: _check_program(data)),
        _least(lambda: _check_models(payloads)),
        _least(lambda: program.run(*inputs)),
        _least(lambda: isolated.run(*inputs)),
    )


def _check_program(data: bytes) -> None:
    pte_check.check(data, signature_of)


def _check_models(payloads: Sequence[payload.Payload]) -> None:
    for one in payloads:
        tflite.check(one.tflite)


def _least(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _programs() -> dict[str, bytes]:
    torch.manual_seed(0)
    networks: dict[str, tuple[nn.Module, torch.Tensor]] = {
        "convolutions": (
            nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16 * 144, 10)),
            torch.rand(1, 3, 16, 16),
        ),
        "attention": (nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), torch.rand(1, 8, 32)),
    }
    return {name: lower(quantize(net.eval(), (x,), [(x,)])).buffer for name, (net, x) in networks.items()}


if __name__ == "__main__":
    main()

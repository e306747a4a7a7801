"""LiteRT runs each kind of operator with all scales that `tflite.check` accepts: none ends the process."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator, Sequence

import flatbuffers  # noqa: TID251  the scales are written below the level of the package
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema  # noqa: TID251  as above
from ai_edge_litert.interpreter import Interpreter
from tests.kind_graphs import GRAPHS

from openneutron.errors import FormatError
from openneutron.formats import tflite
from openneutron.ir.kinds import KINDS

EXPONENTS = -126, -108, -64, -8, -7, 0, 20, 64, 106, 107, 108, 126


def with_scales(model: bytes, exponents: Sequence[int]) -> bytes:
    """Returns the model with powers of two as scales: of the first input, of all other inputs, and of the output."""
    table = schema.ModelT.InitFromPackedBuf(model, 0)
    graph = table.subgraphs[0]
    for index, tensor in enumerate(graph.tensors):
        place = 2 if index in graph.operators[-1].outputs else min(index, 1)
        if tensor.quantization is not None and tensor.quantization.scale is not None:
            tensor.quantization.scale = np.full(len(tensor.quantization.scale), 2.0 ** exponents[place], np.float32)
    builder = flatbuffers.Builder(len(model))
    builder.Finish(table.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def accepted_models(name: str) -> Iterator[bytes]:
    model = tflite.write(GRAPHS[name])
    for first in EXPONENTS:
        for other, output in ((first, first), *((first, each) for each in EXPONENTS), *((e, e) for e in EXPONENTS)):
            changed = with_scales(model, (first, other, output))
            try:
                tflite.check(changed)
            except FormatError:
                continue
            yield changed


def runs(model: bytes) -> bool:
    """Returns whether LiteRT runs the model. It may reject one."""
    try:
        interpreter = Interpreter(model_content=model, num_threads=1)
        interpreter.allocate_tensors()
        interpreter.invoke()
    except (ValueError, RuntimeError):
        return False
    return True


def status_after_running(models: Sequence[bytes]) -> int:
    """Returns the status of a process that runs the models: 0 if LiteRT rejected only some of them."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    status = 1
    faulthandler.disable()  # pytest's would print the stacks of a child that LiteRT ends
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        status = int(not sum(map(runs, models)))
    finally:
        os._exit(status)


@pytest.mark.parametrize("name", KINDS)
def test_accepted_scales_end_no_process(name: str) -> None:
    models = list(accepted_models(name))
    assert len(models) > len(EXPONENTS)
    assert status_after_running(models) == 0


def test_a_larger_scale_of_a_sum_would_end_the_process() -> None:
    assert os.WIFSIGNALED(status_after_running([with_scales(tflite.write(GRAPHS["ADD"]), (0, 0, 108))]))

"""The limit of the scales of a batched product, against LiteRT's kernel."""

from __future__ import annotations

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from tests.net import INT8

from openneutron.errors import FormatError
from openneutron.formats.tflite.check import check
from openneutron.formats.tflite.write import write
from openneutron.ir.graph import Graph, Op, QParams, Tensor
from openneutron.ir.kinds import BATCH_MATMUL
from openneutron.ir.scales import may_break_scale_limits, scale_fault

HIGHEST = 127


def product(terms: int, factor: float) -> Op:
    """Returns the product of two vectors of `terms` values with scale 1, whose output scale is 1 / factor."""
    operands = [Tensor(shape, INT8, QParams.per_tensor(1.0, -128)) for shape in ((1, terms), (terms, 1))]
    output = Tensor((1, 1), INT8, QParams.per_tensor(1 / factor, 0))
    return Op(BATCH_MATMUL, tuple(operands), output, {"adj_x": False, "adj_y": False})


def written(op: Op) -> bytes:
    return write(Graph(op.inputs, (op.output,), (op,)))


def code_of_largest_values(op: Op) -> int:
    """Returns the code that LiteRT computes if all codes of the operands are the highest."""
    interpreter = Interpreter(model_content=written(op))
    interpreter.allocate_tensors()
    for details in interpreter.get_input_details():
        interpreter.set_tensor(details["index"], np.full(details["shape"], HIGHEST, np.int8))
    interpreter.invoke()
    return int(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]).item())


@pytest.mark.parametrize(
    ("terms", "limit"), [(1, 2**15), (3, 2**13), (64, 2**9), (100, 2**8), (1024, 2**5), (4096, 2**3), (30000, 1)]
)
def test_the_limit_of_a_product_equals_the_kernel(terms: int, limit: int) -> None:
    inside, outside = product(terms, 0.99 * limit), product(terms, 1.01 * limit)
    assert not scale_fault(inside)
    check(written(inside))
    assert code_of_largest_values(inside) == HIGHEST
    assert f"the ratio must be below {limit}" in scale_fault(outside)
    with pytest.raises(FormatError, match="scales of BATCH_MATMUL"):
        check(written(outside))
    assert code_of_largest_values(outside) < HIGHEST


@pytest.mark.parametrize(
    ("terms", "limit"),
    [(33025, "1"), (33026, "0.5, because a sum of 33026"), (2**20, "0.03125, because a sum of 1048576")],
)
def test_the_message_for_many_terms(terms: int, limit: str) -> None:
    message = scale_fault(product(terms, 1.5))
    assert message.partition("must be below ")[2].removesuffix(" products may exceed 32 bits") == limit


@pytest.mark.parametrize("terms", [1, 64, 33025, 33026, 70000, 2**20])
def test_the_fast_check_of_scales_finds_all_faults(terms: int) -> None:
    limit = BATCH_MATMUL.accumulator.limit(terms) if BATCH_MATMUL.accumulator else 0.0
    for factor, is_fault in ((1.01 * limit, True), (0.99 * limit, False), (1e-6, False)):
        op = product(terms, factor)
        assert bool(scale_fault(op)) is is_fault
        found = may_break_scale_limits([tensor.qparams for tensor in op.inputs], op.output.qparams, terms)
        assert found if is_fault else not found or factor > limit / 4

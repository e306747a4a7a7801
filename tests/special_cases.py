"""Table of the operator tests: functions of one or two values of `ops/special_functions.py`."""

from __future__ import annotations

import torch
from tests.arithmetic_cases import IMAGE, one
from tests.case import Case, of

__all__ = ["CASES"]

ROWS = (3, 8)
TINY = torch.linspace(-2, 3, 8)

CASES: tuple[Case, ...] = (
    *one("aten.deg2rad.default", torch.deg2rad, "large"),
    *one("aten.rad2deg.default", torch.rad2deg, ""),
    Case("aten.erfc.default", "unit", of(torch.erfc), (ROWS,), on_cpu=("aten.erf.default",)),
    Case("aten.fmax.default", "two", of(torch.fmax), (IMAGE, IMAGE)),
    Case("aten.fmax.default", "constant", of(lambda c, x: torch.fmax(x, c), TINY), (ROWS,)),
    Case("aten.fmin.default", "two", of(torch.fmin), (IMAGE, IMAGE)),
    Case("aten.hypot.default", "two", of(torch.hypot), (ROWS, ROWS)),
    Case("aten.hypot.default", "broadcast", of(torch.hypot), (IMAGE, (4, 1, 1))),
    Case("aten.logaddexp2.default", "two", of(torch.logaddexp2), (ROWS, ROWS)),
    Case("aten.copysign.Tensor", "computed", of(torch.copysign), (ROWS, ROWS)),
    Case("aten.copysign.Tensor", "constant", of(lambda c, x: torch.copysign(x, c), TINY), (ROWS,)),
    Case("aten.copysign.Scalar", "number", of(lambda x: torch.copysign(x, -0.0)), (ROWS,)),
    Case("aten.heaviside.default", "number", of(lambda c, x: torch.heaviside(x, c), torch.tensor(0.5)), (ROWS,)),
    Case("aten.heaviside.default", "after relu", of(lambda c, x: torch.heaviside(x.relu(), c), TINY), (ROWS,)),
    Case("aten.ldexp.Tensor", "constant", of(lambda c, x: torch.ldexp(x, c), torch.tensor([1, -2, 3, 0] * 2)), (ROWS,)),
    Case("aten.ldexp.Tensor", "computed", of(torch.ldexp), (ROWS, ROWS)),
    Case("aten.ldexp.Tensor", "computed integers", of(lambda x, y: torch.ldexp(x, y.to(torch.int64))), (ROWS, ROWS),
         on_cpu=("dim_order_ops._to_dim_order_copy.default",) * 2),
    Case("aten.angle.default", "unit", of(torch.angle), (ROWS,)),
    Case("aten.dist.default", "two", of(torch.dist), (ROWS, ROWS)),
    Case("aten.dist.default", "order 1", of(lambda x, y: torch.dist(x, y, 1)), (ROWS, ROWS)),
)  # fmt: skip

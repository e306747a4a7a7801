"""Compares each operator with the converted module: `python -m benchmarks.operators [OPERATOR ...]`.

Runs the cases of `tests/operator_cases.py` and prints the agreement of `.pte` and converted module for each operator of
the table: the largest difference in LSB of the output, and the percentage of equal values.
"""

from __future__ import annotations

import argparse
import warnings

from rich.console import Console
from rich.progress import track
from rich.table import Table
from tests.case import Case
from tests.operator_cases import CASES
from tests.oracle import Agreement, agreement, everything_on_the_npu, lowered, quantized

from openneutron.ops import DECLARED


def measure(case: Case) -> Agreement:
    """Return the agreement of one case. Raises if an operator of the case is not on the NPU."""
    model = quantized(case.build(), case.shapes, case.spread, **dict(case.options))
    program = lowered(model)
    if not everything_on_the_npu(program):
        raise RuntimeError(f"{case.id} is not one delegate: {program.placement}")
    return agreement(program, model, spread=case.spread)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [spec.name for spec in DECLARED]
    parser.add_argument("operator", nargs="*", metavar="OPERATOR", help=", ".join(names))
    wanted = parser.parse_args().operator or names
    if unknown := set(wanted) - set(names):
        parser.error(f"no such operator: {', '.join(sorted(unknown))}")
    warnings.simplefilter("ignore")
    cases = [case for case in CASES if case.spec.name in wanted]
    found: dict[str, list[Agreement]] = {}
    for case in track(cases, "Operators", console=Console(stderr=True)):
        found.setdefault(case.spec.name, []).append(measure(case))
    table = Table("operator", "cases", "values", "max LSB", "exact %", "worst case exact %")
    for name, agreements in found.items():
        total = sum(agreements[1:], agreements[0])
        lowest = min(one.exact for one in agreements)
        row = (len(agreements), total.values, total.worst, f"{total.exact:.2f}", f"{lowest:.2f}")
        table.add_row(name, *map(str, row))
    Console().print(table)


if __name__ == "__main__":
    main()

"""Lists the operators that the lowering adds: `python -m benchmarks.added_operators [NETWORK ...] [--target NAME]`.

An added operator moves values (PAD, SLICE, CONCATENATION, TRANSPOSE) for an operator of the model that computes
values, or for an input or output of the program. The table has a row for each network of `benchmarks.zoo`. It
shows the share of all added operators in the estimated cycles of the network, and the share of each group of added
operators if it is above `SHOWN_SHARE`. Networks have random weights, because cycles do not depend on weights. All
networks take some five minutes on two cores.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tests.graphs import placed_graphs
from tests.oracle import quantized
from torch.fx import Node

from openneutron.compile_spec import CompileOptions
from openneutron.core.fx import op_name
from openneutron.ir.cost import cost_of
from openneutron.ir.graph import Op
from openneutron.ir.kinds import Work
from openneutron.ops.declared import facts_of
from openneutron.targets import TARGETS, NeutronTarget

from .zoo import ZOO, Member

__all__ = ["SHOWN_SHARE", "Added", "added_by", "added_in"]

SHOWN_SHARE = 0.003
"""The smallest share of the cycles of a network for which the table shows a group of operators."""


@dataclass(frozen=True)
class Added:
    """Estimated cycles of a network, and of its added operators by kind and by the operator that needs them."""

    cycles: int
    cycles_of_added: Counter[tuple[str, str]]

    @property
    def share(self) -> float:
        """The share of all added operators in the cycles, 0 to 1."""
        return self.cycles_of_added.total() / self.cycles

    def groups(self) -> list[str]:
        """Returns "2.1 % PAD for aten.conv2d" for each group above `SHOWN_SHARE`, the largest first."""
        shares = ((cycles / self.cycles, *group) for group, cycles in self.cycles_of_added.most_common())
        return [f"{100 * share:.1f} % {kind} for {name}" for share, kind, name in shares if share > SHOWN_SHARE]


def added_by(ops: Iterable[Op], nodes: dict[str, Node], target: NeutronTarget) -> Added:
    """Returns the cycles of `ops`, the operators of the partitions of a graph with these nodes by name."""
    total, added = 0, Counter[tuple[str, str]]()
    for op in ops:
        cycles = cost_of(op, target).cycles
        total += cycles
        node = nodes.get(op.origin)
        if op.kind.work in (Work.NOTHING, Work.PART) and not _moves_values(node):
            added[op.kind.name, "an input or output" if node is None else op_name(node)] += cycles
    return Added(total, added)


def _moves_values(node: Node | None) -> bool:
    return node is not None and (facts_of(node).movement is not None or "pad" in op_name(node))


def added_in(member: Member, target: NeutronTarget, *, small: bool = False) -> Added:
    """Quantizes and lowers a network, and returns its cycles."""
    shape = member.small if small else member.full
    options: dict[str, Any] = {"target": target.name}
    model = quantized(member.build(shape), (shape,), **options)
    program = torch.export.export(model.module, model.example_inputs)
    nodes = {node.name: node for node in program.graph.nodes if node.op == "call_function"}
    _, graphs = placed_graphs(program, CompileOptions(**options))
    return added_by((op for graph in graphs for op in graph.ops), nodes, target)


def main() -> None:
    """Print a row for each network as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"any of {', '.join(ZOO)}; all without one")
    parser.add_argument("--target", default="imxrt700", choices=sorted(TARGETS))
    parser.add_argument("--small", action="store_true", help="small inputs, as in tests")
    args = parser.parse_args()
    table = Table("network", "cycles", "added", "groups of added operators")
    console = Console()
    for name in args.networks or ZOO:
        found = added_in(ZOO[name], TARGETS[args.target], small=args.small)
        console.print(f"{name}: {found.cycles:,} cycles, {100 * found.share:.1f} % added")
        table.add_row(name, f"{found.cycles:,}", f"{100 * found.share:.1f} %", "\n".join(found.groups()))
    console.print(table)


if __name__ == "__main__":
    main()

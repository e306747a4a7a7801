"""Joins the times of a board with the operators of a program, and compares them with the estimates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from openneutron.core.unions import find_root
from openneutron.errors import InputError
from openneutron.page.content import CpuTimeRow, KernelRow, LayerRow, ProfileRow, ProfileRows, Summary
from openneutron.profiling.recorded import BoardProfile, DelegateTimes, median
from openneutron.targets import Costs, NeutronTargetSpec, Target
from openneutron.vendor.profiling import node_of

__all__ = ["NO_NPU", "joined", "layer_cycles", "with_profile"]

NO_NPU = (
    "The profile has no kernels of the NPU. The payload of a portable program is a TFLite model, which only a host "
    "runs, so it has no operators of the NPU to measure: lower with use_profiling for a device program, and run that "
    "on the board."
)
_MOST_NAMES = 4


def with_profile(summary: Summary, profile: BoardProfile, target: Target | None = None) -> Summary:
    """Returns a summary with the profile. `target` is the target of the estimates, by default that of the summary.

    Raises the errors of `joined`.
    """
    costs = None if target is None else NeutronTargetSpec(target).neutron_target.costs
    return replace(summary, profile=joined(summary, profile, costs))


def joined(summary: Summary, profile: BoardProfile, costs: Costs | None = None) -> ProfileRows:
    """Joins a profile with the operators of a summary.

    The summary of a device program that was lowered with `use_profiling` maps each kernel to the operators that it
    computes. A row has the kernels and operators that this map connects. Without a map, the first kernel is joined with
    the first operator, and so on, if a delegate has the same number of both; otherwise, a row has the whole delegate.

    `costs` are the coefficients of the estimates; None takes the estimates of the summary.

    Raises `InputError` for a profile without events, for a profile whose numbers of delegates or kernels differ
    from those of the program, and for a map that names a kernel that the profile does not have.
    """
    if not profile.delegates and not profile.cpu:
        raise InputError(
            "The profile has no events of kernels. Build ExecuTorch and the application with ET_EVENT_TRACER_ENABLED, "
            "give load_method the event tracer, and record the profile after a run."
        )
    positions = _positions(summary.layers)
    kernels = _kernels_of(summary.kernels)
    count = 1 + max([*positions, *kernels], default=-1)
    if profile.delegates and count and len(profile.delegates) != count:
        raise InputError(
            f"The profile has times of {len(profile.delegates)} delegates, and the program has {count}. Give the "
            "program that ran on the board."
        )
    rows: list[ProfileRow] = []
    notes: list[str] = [] if profile.delegates else [NO_NPU]
    for number, times in enumerate(profile.delegates):
        layers = [(at, summary.layers[at]) for at in positions.get(number, [])]
        found, note = _delegate_rows(number, times, layers, kernels.get(number, []))
        rows += [_with_estimate(row, summary, costs) for row in found]
        notes += [note] if note else []
    ends = sum(median(one.end) for one in profile.delegates if one.end)
    cpu = tuple(CpuTimeRow(call.name, median(call.ticks)) for call in profile.cpu)
    return ProfileRows(profile.runs, tuple(rows), ends, cpu, tuple(notes))


def layer_cycles(layer: LayerRow, costs: Costs, *, moves_while_computing: bool) -> float:
    """Returns the estimated cycles of an operator with these coefficients (formula: `openneutron.ir.cost`)."""
    compute = layer.formula_cycles * costs.compute_factor(layer.work)
    transfer = layer.moved_bytes / costs.bytes_per_cycle
    return (max(compute, transfer) if moves_while_computing else compute + transfer) + costs.operator_cycles


def _positions(layers: Sequence[LayerRow]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for position, layer in enumerate(layers):
        found.setdefault(layer.delegate, []).append(position)
    return found


def _kernels_of(rows: Iterable[KernelRow]) -> dict[int, list[KernelRow]]:
    found: dict[int, list[KernelRow]] = {}
    for row in rows:
        found.setdefault(row.delegate, []).append(row)
    return found


def _delegate_rows(
    number: int, times: DelegateTimes, layers: list[tuple[int, LayerRow]], kernels: list[KernelRow]
) -> tuple[list[ProfileRow], str]:
    if kernels:
        if len(kernels) != len(times.kernels):
            raise InputError(
                f"Delegate {number} has {len(times.kernels)} kernels in the profile and {len(kernels)} in the program. "
                "Give the program that ran on the board."
            )
        if unknown := {one.number for one in kernels} - set(range(len(times.kernels))):
            raise InputError(
                f"Delegate {number} has no kernel {min(unknown)} in the profile, but the program's map of kernels has "
                "one. Give the folder of the build that ran on the board."
            )
        return _mapped_rows(number, times, layers, kernels), ""
    if len(layers) == len(times.kernels):
        rows = [_row(number, times, [at], [layer]) for at, layer in enumerate(layers)]
        return rows, (
            f"Delegate {number} has as many kernels as operators; they are joined by their order. Lower with "
            "use_profiling for the converter's map of kernels."
        )
    whole = [_row(number, times, range(len(times.kernels)), layers)]
    return whole, (
        f"Delegate {number} has {len(times.kernels)} kernels and {len(layers)} operators, and no map of kernels, so "
        "only their sum is known. Lower with use_profiling, and give the folder of that build."
    )


def _mapped_rows(
    number: int, times: DelegateTimes, layers: list[tuple[int, LayerRow]], kernels: list[KernelRow]
) -> list[ProfileRow]:
    """Returns a row for each connected set of kernels and operators. Linear in both, except for the union-find."""
    parent: dict[str, str] = {}
    for kernel in kernels:
        for node in kernel.nodes:
            parent[find_root(parent, f"node {node}")] = find_root(parent, f"kernel {kernel.number}")
    groups: dict[str, tuple[list[int], list[tuple[int, LayerRow]]]] = {}
    for kernel in kernels:
        groups.setdefault(find_root(parent, f"kernel {kernel.number}"), ([], []))[0].append(kernel.number)
    for at, layer in layers:
        named = layer.node or node_of(layer.tensor)
        root = find_root(parent, f"node {named}")
        if named is not None and root in groups:
            groups[root][1].append((at, layer))
    names = {kernel.number: kernel.name for kernel in kernels}
    return [
        _row(number, times, numbers, found, ", ".join(dict.fromkeys(names[one] for one in numbers)))
        for numbers, found in groups.values()
    ]


def _row(
    delegate: int,
    times: DelegateTimes,
    kernels: Iterable[int],
    layers: Sequence[tuple[int, LayerRow]],
    kernel_names: str = "",
) -> ProfileRow:
    numbers = tuple(kernels)
    runs = [sum(run) for run in zip(*(times.kernels[one] for one in numbers), strict=True)]
    rows = [layer for _, layer in layers]
    operators = _listed(layer.operator for layer in rows)
    return ProfileRow(
        name=_listed(layer.node or layer.tensor for layer in rows) or f"kernels {_listed(map(str, numbers))}",
        operator=operators or kernel_names or "unknown",
        delegate=delegate,
        kernels=numbers,
        cycles=median(runs),
        low=min(runs),
        high=max(runs),
        estimated=None,
        layers=tuple(at for at, _ in layers),
        module=_listed(layer.module for layer in rows if layer.module) or None,
        source=_listed(layer.source for layer in rows if layer.source) or None,
    )


def _listed(names: Iterable[str]) -> str:
    found = list(dict.fromkeys(names))
    shown = ", ".join(found[:_MOST_NAMES])
    return shown if len(found) <= _MOST_NAMES else f"{shown} and {len(found) - _MOST_NAMES} more"


def _with_estimate(row: ProfileRow, summary: Summary, costs: Costs | None) -> ProfileRow:
    if not row.layers:
        return row
    layers = [summary.layers[at] for at in row.layers]
    if costs is None:
        return replace(row, estimated=sum(layer.cycles for layer in layers))
    moves = summary.target.neutron_class == "Neutron-S"
    return replace(row, estimated=round(sum(layer_cycles(one, costs, moves_while_computing=moves) for one in layers)))

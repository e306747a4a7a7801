"""Caches of ExecuTorch and torch that would keep each lowered program in memory."""

from __future__ import annotations

from executorch.exir.backend.utils import is_same_node
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch._subclasses.fake_tensor import FakeTensorMode

__all__ = ["forget_lowered_programs"]


def forget_lowered_programs() -> None:
    """Removes lowered programs, with their payloads, from caches that have no limit. Linear in the entries.

    ExecuTorch caches the comparison of each node before and after partitioning. torch caches the shapes of the outputs
    of each call, and a call of a delegate has the delegate as an operand.
    """
    is_same_node.cache_clear()
    calls = FakeTensorMode.cache
    for key in [key for key in calls if any(isinstance(value, LoweredBackendModule) for value in key.key)]:
        del calls[key]

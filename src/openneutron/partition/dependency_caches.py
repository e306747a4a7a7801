"""Removes lowered programs from caches of ExecuTorch and torch, and caches what torch loads again and again."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch._export.utils as torch_export
from executorch.exir.backend.utils import is_same_node
from executorch.exir.delegate import executorch_call_delegate
from torch._subclasses.fake_tensor import FakeTensorMode

__all__ = ["forget_lowered_programs", "load_composite_operators_once"]


def forget_lowered_programs() -> None:
    """Removes lowered programs, with their payloads, from caches that have no limit. Linear in the entries.

    ExecuTorch caches the comparison of each node before and after partitioning. torch caches the shapes of the outputs
    of each call, and a call of a delegate has the delegate as an operand. A release without such a cache keeps nothing.
    """
    if clear := getattr(is_same_node, "cache_clear", None):
        clear()
    calls = getattr(FakeTensorMode, "cache", {})
    for key in [key for key in calls if key.key[0] is executorch_call_delegate]:
        del calls[key]


@contextmanager
def load_composite_operators_once() -> Iterator[None]:
    """Lets torch load the composite operators of all libraries once in the block, which must not define operators.

    ExecuTorch reads a table of decompositions. For each library that it adds to the table, torch loads these operators
    again. The function that loads them is private; without it, this block has no effect. Not for two threads at once.
    """
    load = getattr(torch_export, "_materialize_cpp_cia_ops", None)
    if load is None:
        yield
        return
    torch_export._materialize_cpp_cia_ops = functools.cache(load)
    try:
        yield
    finally:
        torch_export._materialize_cpp_cia_ops = load

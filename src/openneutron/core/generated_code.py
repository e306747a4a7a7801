"""The code that torch.fx generates for graph modules."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule

from openneutron.core.locks import ForkSafeLock, Order

__all__ = ["code_on_demand"]

# What `GraphModule.recompile` assigns and other methods of torch read, and the methods that pickle the code. `forward`
# is an attribute of the class, and each graph module has a class of its own.
_DEFERRED = ("forward", "_code", "_in_spec", "_out_spec", "__reduce__", "__reduce_package__")


@contextmanager
def code_on_demand() -> Iterator[None]:
    """Generates the code of a graph module when it is first read, while this thread is in the block.

    torch.export, torchao and ExecuTorch create many graph modules that nothing runs, and call `recompile` after each
    change of a graph, so code was a tenth of the time of `quantize`. A module may leave the block without code. It then
    gets its code when it is called, read, copied or pickled, also by several threads at once. In the block, `recompile`
    returns None, so pickling a graph module raises `AttributeError`. Threads outside of a block generate code at once.
    """
    _thread.blocks += 1
    try:
        with _LOCK:
            _patch.enter()
        try:
            yield
        finally:
            with _LOCK:
                _patch.leave()
    finally:
        _thread.blocks -= 1


class _Thread(threading.local):
    """The number of blocks that this thread is in."""

    blocks = 0


@dataclass
class _Patch:
    """The replacement of `GraphModule.recompile`, which begins with the first block and ends with the last one.

    Only a thread that holds `_LOCK` changes it. A process that was forked while another thread was in a block keeps the
    replacement, which then generates code at once.
    """

    blocks: int = 0
    """The number of blocks that any threads are in."""
    generate: Callable[[GraphModule], Any] = GraphModule.recompile
    """The method that was replaced."""

    def enter(self) -> None:
        if self.blocks == 0:
            self.generate = GraphModule.recompile
            GraphModule.recompile = _recompile  # type: ignore[method-assign, assignment]
        self.blocks += 1

    def leave(self) -> None:
        self.blocks -= 1
        if self.blocks == 0:
            GraphModule.recompile = self.generate  # type: ignore[method-assign, assignment]


_LOCK = ForkSafeLock(Order.CODE)
_thread = _Thread()
_patch = _Patch()


def _recompile(module: GraphModule) -> Any:
    """Removes the code of a module, so that it is generated on demand. Generates it outside of a block."""
    if _thread.blocks == 0:
        return _patch.generate(module)
    with _LOCK:
        for name in _DEFERRED:
            vars(module).pop(name, None)
            setattr(type(module), name, _Generated(name, _patch.generate))
    return None


class _Generated:
    """An attribute of a graph module without code. Reading it generates the code, which replaces it."""

    def __init__(self, name: str, generate: Callable[[GraphModule], Any]) -> None:
        self._name = name
        self._generate = generate

    def __get__(self, module: GraphModule | None, owner: type[GraphModule]) -> Any:
        if module is None:
            return self
        with _LOCK:
            if vars(owner).get(self._name) is self:  # else another thread has generated the code meanwhile
                self._generate(module)
                # The others go last. A thread that reads one of them before that waits for the lock.
                for name in _DEFERRED:
                    if isinstance(vars(owner).get(name), _Generated):
                        delattr(owner, name)
        return getattr(module, self._name)

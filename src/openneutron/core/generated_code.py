"""The code that torch.fx generates for graph modules."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.fx import GraphModule

__all__ = ["code_on_demand"]

# What `GraphModule.recompile` assigns and other methods of torch read. `forward` is an attribute of the class, and each
# graph module has a class of its own.
_GENERATED = ("forward", "_code", "_in_spec", "_out_spec")


@contextmanager
def code_on_demand() -> Iterator[None]:
    """Generates the code of a graph module when it is first read, while this thread is in the block.

    torch.export, torchao and ExecuTorch create many graph modules that nothing runs, and call `recompile` after each
    change of a graph, so code was a tenth of the time of `quantize`. A module may leave the block without code, and
    gets it at its first call. Only pickling fails without code: call `module.recompile()` before, after the block.
    """
    generate, thread = GraphModule.recompile, threading.get_ident()

    def defer(module: GraphModule) -> Any:
        if threading.get_ident() != thread:
            return generate(module)
        for name in _GENERATED:
            vars(module).pop(name, None)
            setattr(type(module), name, _Generated(name, generate))
        return None

    GraphModule.recompile = defer  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        GraphModule.recompile = generate  # type: ignore[method-assign]


class _Generated:
    """An attribute of a graph module without code. Reading it generates the code, which assigns it."""

    def __init__(self, name: str, generate: Callable[[GraphModule], Any]) -> None:
        self._name = name
        self._generate = generate

    def __get__(self, module: GraphModule | None, owner: type[GraphModule]) -> Any:
        if module is None:
            return self
        for name in _GENERATED:
            delattr(owner, name)
        self._generate(module)
        return getattr(module, self._name)

"""The generation of code on demand."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from threading import Barrier
from typing import Any

import cloudpickle
import pytest
import torch
from torch.fx import GraphModule, symbolic_trace
from torch.package.package_exporter import PackageExporter
from torch.package.package_importer import PackageImporter

from openneutron.core.generated_code import code_on_demand


def add_one(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def exported() -> GraphModule:
    module = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)).module()
    assert isinstance(module, GraphModule)
    return module


def subtract_instead(module: GraphModule) -> None:
    (node,) = (node for node in module.graph.nodes if node.op == "call_function")
    node.target = torch.sub
    module.recompile()


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[GraphModule]:
    """Returns the modules whose code was generated, once for each generation."""
    modules: list[GraphModule] = []
    recompile = GraphModule.recompile

    def counted(module: GraphModule) -> Any:
        modules.append(module)
        return recompile(module)

    monkeypatch.setattr(GraphModule, "recompile", counted)
    return modules


def test_code_is_generated_once_and_of_the_latest_graph(generated: list[GraphModule]) -> None:
    with code_on_demand():
        module = symbolic_trace(add_one)
        module.recompile()
        subtract_instead(module)
        assert not generated
        assert module(torch.ones(1)).item() == 0
        assert generated == [module]
    module(torch.ones(1))
    assert generated == [module]


READERS: dict[str, Callable[[GraphModule], Any]] = {
    "a call": lambda module: module(torch.ones(1, 2)).shape,
    "its code": lambda module: module.code,
    "its text": str,
    "the signature of forward": lambda module: str(inspect.signature(module.forward)),
    "a call of a copy": lambda module: copy.deepcopy(module)(torch.ones(1, 2)).shape,
    "an export": lambda module: str(torch.export.export(module, (torch.ones(1, 2),)).graph),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("inside", [True, False])
def test_a_module_without_code_is_like_one_with_code(reader: str, inside: bool) -> None:
    read = READERS[reader]
    expected = read(exported())
    with code_on_demand():
        module = exported()
        found = read(module) if inside else None
    assert (found if inside else read(module)) == expected


def test_code_that_is_replaced_in_the_block_is_not_read_any_more() -> None:
    module = symbolic_trace(add_one)
    with code_on_demand():
        subtract_instead(module)
        assert "sub" in module.code
    assert module(torch.ones(1)).item() == 0


def test_after_the_block_code_is_generated_at_once(generated: list[GraphModule]) -> None:
    with code_on_demand():
        module = symbolic_trace(torch.nn.Sequential(torch.nn.ReLU()))
    module.recompile()
    assert generated == [module]
    assert pickle.loads(pickle.dumps(module))(torch.ones(1)).item() == 1


def test_the_block_ends_with_an_exception(generated: list[GraphModule]) -> None:
    with pytest.raises(ZeroDivisionError), code_on_demand():
        raise ZeroDivisionError
    assert generated == [symbolic_trace(add_one)]


def test_other_threads_generate_code_at_once(generated: list[GraphModule]) -> None:
    with code_on_demand(), ThreadPoolExecutor(1) as other:
        module = other.submit(symbolic_trace, add_one).result()
        assert generated == [module]


class BlocksOfOneThread:
    """Blocks that a thread of its own enters and leaves."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1)
        self.blocks: list[AbstractContextManager[None]] = []

    def enter(self) -> None:
        block = code_on_demand()
        self.pool.submit(block.__enter__).result()
        self.blocks.append(block)

    def leave(self, error: Exception | None) -> None:
        kind = None if error is None else type(error)
        self.pool.submit(self.blocks.pop().__exit__, kind, error, None).result()

    def generates_at_once(self) -> bool:
        return "_code" in vars(self.pool.submit(symbolic_trace, add_one).result())


@pytest.mark.parametrize("steps", ["ABab", "ABba", "AaBb", "AABaab", "AABaba", "ABBbab", "ABCabc", "ABaAba"])
@pytest.mark.parametrize("error", [None, ZeroDivisionError()], ids=["no error", "an error in each block"])
def test_blocks_of_several_threads_overlap(steps: str, error: Exception | None) -> None:
    """A capital is a thread that enters a block, a small letter one that leaves it."""
    recompile = GraphModule.recompile
    threads = {name: BlocksOfOneThread() for name in sorted(set(steps.upper()))}
    for step in steps:
        thread = threads[step.upper()]
        if step.isupper():
            thread.enter()
        else:
            thread.leave(error)
        for one in threads.values():
            assert one.generates_at_once() == (not one.blocks)
    assert GraphModule.recompile is recompile
    for one in threads.values():
        one.pool.shutdown()


def test_nested_blocks_generate_code_once(generated: list[GraphModule]) -> None:
    with code_on_demand():
        with code_on_demand():
            module = symbolic_trace(add_one)
        other = symbolic_trace(add_one)
        assert not generated
    assert (module(torch.ones(1)).item(), other(torch.ones(1)).item()) == (2, 2)
    assert generated == [module, other]


def relu() -> GraphModule:
    """Returns a module that can be pickled, as one of a function cannot."""
    return symbolic_trace(torch.nn.Sequential(torch.nn.ReLU()))


def dumped(module: GraphModule) -> GraphModule:
    found = pickle.loads(pickle.dumps(module))
    assert isinstance(found, GraphModule)
    return found


def saved_in_package(module: GraphModule) -> GraphModule:
    file = io.BytesIO()
    with PackageExporter(file) as exporter:
        exporter.extern("torch.**")
        exporter.save_pickle("package", "module.pkl", module)
    file.seek(0)
    found = PackageImporter(file).load_pickle("package", "module.pkl")
    assert isinstance(found, GraphModule)
    return found


PICKLES: dict[str, Callable[[GraphModule], GraphModule]] = {
    "pickle": dumped,
    "cloudpickle": lambda module: cloudpickle.loads(cloudpickle.dumps(module)),
    "torch.package": saved_in_package,
}


@pytest.mark.parametrize("pickled", PICKLES.values(), ids=PICKLES)
def test_a_module_without_code_can_be_pickled(pickled: Callable[[GraphModule], GraphModule]) -> None:
    with code_on_demand():
        module = relu()
    assert pickled(module)(torch.tensor([-1.0, 1.0])).tolist() == [0, 1]
    assert pickled(module).code == module.code


FIRST_READERS: dict[str, Callable[[GraphModule], Any]] = {
    "a call": lambda module: module(torch.ones(1)).item(),
    "forward": lambda module: module.forward(torch.ones(1)).item(),
    "its code": lambda module: module.code,
    "a copy": lambda module: copy.deepcopy(module)(torch.ones(1)).item(),
    "a pickled copy": lambda module: pickle.loads(pickle.dumps(module))(torch.ones(1)).item(),
}


@pytest.mark.parametrize("others", FIRST_READERS)
@pytest.mark.parametrize("reader", FIRST_READERS)
def test_several_threads_read_a_module_without_code(reader: str, others: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads do not see a module whose code another thread is generating."""
    recompile = GraphModule.recompile

    def slow(module: GraphModule) -> Any:
        time.sleep(0.005)
        found = recompile(module)
        time.sleep(0.005)
        return found

    expected = [FIRST_READERS[name](relu()) for name in (reader, others, others)]
    monkeypatch.setattr(GraphModule, "recompile", slow)
    with code_on_demand():
        module = relu()
    barrier = Barrier(3)

    def read(name: str) -> Any:
        barrier.wait()
        return FIRST_READERS[name](module)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(read, (reader, others, others))) == expected

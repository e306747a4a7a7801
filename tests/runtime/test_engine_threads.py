"""`load(..., threads=N)`: LiteRT's threads in the delegates of a program."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from ai_edge_litert.interpreter import Interpreter
from tests.flow_support import seeded
from tests.models import Model, conv

from openneutron import load, lower, quantize
from openneutron.errors import OptionError
from openneutron.runtime.threads import current_threads, engine_threads


@pytest.fixture(scope="module")
def program() -> bytes:
    """A program with two delegates and an operator on the CPU between them."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 4, 16, 16, generator=generator) for _ in range(3)]
    model = seeded(lambda: Model(lambda m, x: m.b(m.a(x).relu().sin()).softmax(1), a=conv(), b=conv()))
    return lower(quantize(model, (inputs[0],), inputs, recover=None)).buffer


def test_outputs_do_not_depend_on_the_number_of_threads(program: bytes) -> None:
    values = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    expected = load(program).run(values)
    for threads in (2, 3):
        assert torch.equal(load(program, threads=threads).run(values), expected)
    assert torch.equal(load(program, threads=2, isolated=True).run(values), expected)


def test_each_delegate_gets_the_threads_also_after_a_reset(program: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    interpreter = Interpreter

    def counted(*args: Any, num_threads: int, **named: Any) -> Any:
        given.append(num_threads)
        return interpreter(*args, num_threads=num_threads, **named)

    monkeypatch.setattr("openneutron.runtime.engine.Interpreter", counted)
    loaded = load(program, threads=3)
    loaded.reset()
    load(program)
    assert len(given) >= 3
    assert set(given[: 2 * len(given) // 3]) == {3}
    assert set(given[2 * len(given) // 3 :]) == {1}


@pytest.mark.parametrize("threads", [0, -1, 257, 1.0, True, "2", None])
def test_other_numbers_are_refused(program: bytes, threads: Any) -> None:
    with pytest.raises(OptionError, match="threads is a number from 1 to 256"):
        load(program, threads=threads)


def test_the_number_of_threads_ends_with_the_block() -> None:
    def fail() -> None:
        with engine_threads(4):
            assert current_threads() == 4
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert current_threads() == 1


def test_running_a_program_imports_no_quantization_and_no_lowering(program: bytes, tmp_path: Any) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(program)
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import openneutron\n"
        f"openneutron.load({str(path)!r}).run(torch.ones(1, 4, 16, 16))\n"
        "print(*sorted(set(sys.modules) - before))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = run.stdout.split()
    assert "openneutron.runtime.session" in imported
    heavy = ("torchao", "executorch.exir", "torch.export", "torch._export", "torch._dynamo", "torch._inductor", "sympy")
    assert [name for name in imported if name.startswith(heavy)] == []

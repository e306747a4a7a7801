"""Threads of processes that this package starts wait passively, unless the user chose a policy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from joblib.externals.loky import get_reusable_executor

from openneutron.core.parallel import map_in_order, split
from openneutron.core.waiting import WAIT_POLICY, start_worker, waiting_passively


@pytest.mark.parametrize(("given", "expected"), [({}, "PASSIVE"), ({WAIT_POLICY: "ACTIVE"}, "ACTIVE")])
def test_an_environment_keeps_its_policy(given: dict[str, str], expected: str) -> None:
    assert waiting_passively({**given, "HOME": "/"}) == {"HOME": "/", WAIT_POLICY: expected}


def policy(_: Sequence[int]) -> str | None:
    return os.environ.get(WAIT_POLICY)


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_workers_wait_passively(given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WAIT_POLICY, raising=False)
    if given is not None:
        monkeypatch.setenv(WAIT_POLICY, given)
    get_reusable_executor().shutdown(wait=True)
    assert list(map_in_order(policy, split(range(4), 2), 2)) == [expected] * 2
    get_reusable_executor().shutdown(wait=True)
    assert os.environ.get(WAIT_POLICY) == given


def test_two_threads_start_workers_that_wait_passively(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first thread may end before the workers of the second one start."""
    monkeypatch.delenv(WAIT_POLICY, raising=False)
    first = map_in_order(policy, split(range(6), 3), 2)
    assert next(first) == "PASSIVE"
    assert WAIT_POLICY not in os.environ
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(list, map_in_order(policy, split(range(4), 2), 2)).result() == ["PASSIVE"] * 2
    assert list(first) == ["PASSIVE"] * 2
    get_reusable_executor().shutdown(wait=True)


def test_a_worker_sets_its_policy_before_it_imports_torch() -> None:
    """OpenMP reads the variable at the import."""
    code = f"import sys; from {start_worker.__module__} import {start_worker.__name__}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"

"""Threads of processes that this package starts wait passively, unless the user chose a policy."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
from joblib.externals.loky import get_reusable_executor

from openneutron.core.parallel import map_in_order, split
from openneutron.core.waiting import WAIT_POLICY, waiting_passively


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

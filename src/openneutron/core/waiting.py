"""How the threads of OpenMP wait in processes that this package starts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

__all__ = ["WAIT_POLICY", "passive_children", "waiting_passively"]

WAIT_POLICY = "OMP_WAIT_POLICY"
"""The environment variable of OpenMP that tells threads how to wait. OpenMP reads it when torch is imported.

torch's threads wait actively by default. If other processes use the cores, or a container has fewer cores than threads,
active waiting makes small networks slower by a factor of ten and more.
"""


def waiting_passively(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns `environment` with passive waiting, unless it has a policy."""
    return {WAIT_POLICY: "PASSIVE", **environment}


@contextmanager
def passive_children() -> Iterator[None]:
    """Lets processes that start within the block wait passively, unless the environment has a policy.

    The policy of this process does not change, because OpenMP has read it.
    """
    if WAIT_POLICY in os.environ:
        yield
        return
    os.environ[WAIT_POLICY] = "PASSIVE"
    try:
        yield
    finally:
        os.environ.pop(WAIT_POLICY, None)

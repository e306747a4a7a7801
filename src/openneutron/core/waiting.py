"""How the threads of OpenMP wait in processes that this package starts."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

__all__ = ["WAIT_POLICY", "start_worker", "waiting_passively"]

WAIT_POLICY = "OMP_WAIT_POLICY"
"""The environment variable of OpenMP that tells threads how to wait. OpenMP reads it when torch is imported.

torch's threads wait actively by default. If other processes use the cores, or a container has fewer cores than threads,
active waiting makes small networks slower by a factor of ten and more.
"""


def waiting_passively(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns `environment` with passive waiting, unless it has a policy."""
    return {WAIT_POLICY: "PASSIVE", **environment}


def start_worker(level: int) -> None:
    """Prepares a worker process before it imports torch: its threads wait passively, unless its environment has a
    policy, and messages up to the severity `level` are not logged.

    The environment of the process that starts workers stays as it is, because other threads may start processes, too.
    """
    os.environ.setdefault(WAIT_POLICY, "PASSIVE")
    logging.disable(level)

"""What makes thousands of small exports affordable, which of them --quick leaves out, and what tests of data need."""

from __future__ import annotations

import functools
import gc
import os
import zlib
from pathlib import Path

import pytest
import torch
import torch._export.utils

# Test processes share the cores already: threads of several that wait for one another spin, and take the time of those
# that compute. Processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# 7 % of the time went into looking for cycles among all that torch holds, every 700 allocations.
gc.set_threshold(200_000, 20, 100)

# Every lowering asks every operator of every namespace the same question, which takes a fifth of a small model's time.
# No test registers a composite operator.
torch._export.utils._collect_all_valid_cia_ops_for_namespace = functools.cache(
    torch._export.utils._collect_all_valid_cia_ops_for_namespace
)

# With --quick, so many rows of each table of cases run.
ROWS_OF_A_TABLE = 2
DATA_VARIABLE = "OPENNEUTRON_DATA"
DATA_FOLDER = os.environ.get(DATA_VARIABLE)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare --quick."""
    text = f"leave out tests marked slow, and all but {ROWS_OF_A_TABLE} rows of each parametrized test"
    parser.addoption("--quick", action="store_true", help=text)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep what --quick runs: the same tests on every machine, and in every process."""
    if not config.getoption("--quick"):
        return
    tables: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("slow") is None:
            tables.setdefault(item.nodeid.split("[")[0], []).append(item)
    kept = {id(item) for rows in tables.values() for item in sorted(rows, key=_drawn)[:ROWS_OF_A_TABLE]}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


def _drawn(item: pytest.Item) -> int:
    """A number that has nothing to do with the row's place in its table, nor with other rows."""
    return zlib.crc32(item.nodeid.encode())


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked `data` where no folder is named; hide the folder from all other tests.

    So a test that reads data without the mark fails on every machine, not only on those without the data.
    """
    os.environ.pop(DATA_VARIABLE, None)
    if item.get_closest_marker("data") is None:
        return
    if not DATA_FOLDER:
        pytest.skip(f"{DATA_VARIABLE} is not set")
    os.environ[DATA_VARIABLE] = DATA_FOLDER


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of weights, images and vendor's files, for tests marked `data`."""
    return Path(os.environ[DATA_VARIABLE])

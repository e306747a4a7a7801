"""Settings for fast exports of small models, the options --quick, --rest and --all, and the mark `data`."""

from __future__ import annotations

import gc
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from tests.fast_exports import cache_composite_operators
from tests.selection import ROWS_OF_A_TABLE, quick_tests, rest_of_tests

if TYPE_CHECKING:
    from openneutron import NeutronProgram, QuantizedModel

# Test processes share the cores already. Several threads that wait for each other would spin and slow down others.
# Processes that tests start inherit this setting.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# A shell makes the processes that it starts in the background ignore Ctrl-C, and their children inherit that.
if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The garbage collector took 7 % of the time, because it runs every 700 allocations over all objects of torch.
gc.set_threshold(200_000, 20, 100)

cache_composite_operators()

DATA_VARIABLE = "OPENNEUTRON_DATA"
DATA_FOLDER = os.environ.get(DATA_VARIABLE)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declares --quick, which pyproject.toml sets, and --rest and --all, which replace it."""
    text = f"leave out tests marked slow, and all but {ROWS_OF_A_TABLE} of the rows of each parametrized test (default)"
    parser.addoption("--quick", action="store_true", help=text)
    parser.addoption("--all", action="store_true", help="run all tests")
    text = "run what --quick leaves out, and all tests marked data: after `pytest --quick` without data, all is run"
    parser.addoption("--rest", action="store_true", help=text)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Selects the tests of --quick or --rest, unless all are to run."""
    if config.getoption("--all"):
        return
    kept = rest_of_tests(items) if config.getoption("--rest") else quick_tests(items)
    chosen = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = kept


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test marked `data` without a data folder, and hides the folder from all other tests.

    A test that reads data without the mark therefore fails on each machine.
    """
    os.environ.pop(DATA_VARIABLE, None)
    if item.get_closest_marker("data") is None:
        return
    if not DATA_FOLDER:
        pytest.skip(f"{DATA_VARIABLE} is not set")
    os.environ[DATA_VARIABLE] = DATA_FOLDER


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of weights, images and vendor files, for tests marked `data`."""
    return Path(os.environ[DATA_VARIABLE])


@pytest.fixture(scope="session")
def healthy() -> QuantizedModel:
    """The network of `tests/accuracy_models.py`, quantized once for all tests that only read it."""
    from tests.accuracy_models import net, quantized

    return quantized(net())


@pytest.fixture(scope="session")
def net_program(healthy: QuantizedModel) -> NeutronProgram:
    """The program of `healthy`, with its linear layer on the CPU."""
    from openneutron import lower

    return lower(healthy, operators_not_to_delegate=["aten.linear.default"])

"""Ctrl-C: exit code 130, no traceback and no half-written files, wherever it comes."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.builds import Here

from openneutron.cli.interrupts import Interrupts
from openneutron.cli.terminal import Terminal

INTERRUPTED = 130
TRANSFORM = """
import signal

def swallowed(image):
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException:
        pass
    return image

def other_error(image):
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException as error:
        raise ValueError("the import failed") from error

def plain(image):
    signal.raise_signal(signal.SIGINT)
"""


def test_a_step_ends_with_the_interrupt_that_was_ignored_in_it() -> None:
    interrupts = Interrupts()
    terminal = Terminal(quiet=True, interrupts=interrupts)
    with (
        interrupts,
        pytest.raises(KeyboardInterrupt),
        terminal.step("quantize"),
        contextlib.suppress(KeyboardInterrupt),
    ):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_step_without_an_interrupt_ends_well() -> None:
    with Interrupts() as interrupts, Terminal(quiet=True, interrupts=interrupts).step("quantize"):
        pass
    assert not interrupts.seen


def test_a_process_that_ignores_ctrl_c_goes_on_doing_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGINT)
        assert not interrupts.seen
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", ["swallowed", "other_error", "plain"])
def test_a_verb_ends_with_130_whatever_becomes_of_the_interrupt(
    here: Here, work: Path, tmp_path: Path, name: str
) -> None:
    (work / "interrupted.py").write_text(TRANSFORM)
    model = ("net.py:Net", "--weights", "w.pt", "--input", "1,1,8,8", "--recover", "none")
    data = ("--calibrate", "photos", "--transform", f"interrupted.py:{name}")
    for verb, output in (("build", tmp_path / "out"), ("quantize", tmp_path / "model.pt2")):
        ended = here(verb, *model, *data, "-o", output)
        assert ended.code == INTERRUPTED
        assert "interrupted." in ended.err
        assert "Traceback" not in ended.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


IMPORT = """
import signal, sys
import openneutron.__main__

class Finder:
    @staticmethod
    def find_spec(name, *_):
        if name == "typer":
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Finder)
openneutron.__main__.main()
"""


def test_ctrl_c_during_the_import_shows_no_traceback() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (INTERRUPTED, "")

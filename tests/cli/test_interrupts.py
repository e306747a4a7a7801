"""Ctrl-C: exit code 130, no traceback and no half-written files, wherever it comes."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cli.builds import Here

from openneutron.cli import interrupts as interrupts_module
from openneutron.cli.interrupts import Interrupts, restored_signals
from openneutron.cli.terminal import Terminal
from openneutron.core import files

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
    with restored_signals():
        with (
            interrupts,
            pytest.raises(KeyboardInterrupt),
            terminal.step("quantize"),
            contextlib.suppress(KeyboardInterrupt),
        ):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN, "a second one does not interrupt the end"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_step_without_an_interrupt_ends_well() -> None:
    with Interrupts() as interrupts, Terminal(quiet=True, interrupts=interrupts).step("quantize"):
        pass
    assert not interrupts.seen


def test_a_process_that_ignores_ctrl_c_still_ignores_it() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGINT)
        assert not interrupts.seen
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", ["swallowed", "other_error", "plain"])
def test_a_verb_ends_with_130_even_if_the_interrupt_is_lost(here: Here, work: Path, tmp_path: Path, name: str) -> None:
    (work / "interrupted.py").write_text(TRANSFORM)
    model = ("net.py:Net", "--weights", "w.pt", "--input", "1,1,8,8", "--recover", "none")
    data = ("--calibrate", "photos", "--transform", f"interrupted.py:{name}")
    for verb, output in (("build", tmp_path / "out"), ("quantize", tmp_path / "model.pt2")):
        ended = here(verb, *model, *data, "-o", output)
        assert ended.code == INTERRUPTED
        assert "interrupted." in ended.err
        assert "Traceback" not in ended.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="Windows has no pthread_kill")
@pytest.mark.parametrize(("wait", "ends"), [(60.0, True), (0.2, False)])
def test_an_interrupt_waits_for_the_end_of_an_import(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wait: float, ends: bool
) -> None:
    """Not longer than the limit, because a module of the user may load data for minutes."""
    name, seconds = f"imported_{ends}", 0.5 if ends else 60
    (tmp_path / f"{name}.py").write_text(
        f"import signal, time\nsignal.raise_signal(signal.SIGINT)\ntime.sleep({seconds})\nhas_ended = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(interrupts_module, "LONGEST_WAIT", wait)
    imported = []

    def imports() -> None:
        imported.append(importlib.import_module(name).has_ended)
        time.sleep(60)

    begin = time.monotonic()
    with restored_signals(), Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        imports()
    assert interrupts.number == signal.SIGINT
    assert imported == [True] * ends
    assert time.monotonic() - begin < 30
    sys.modules.pop(name, None)


INTERRUPTED_EARLY = """
import signal, sys
import openneutron.__main__

def interrupt(frame, event, _):
    if event == "call" and frame.f_code.co_name == {function!r} and {module!r} in frame.f_globals["__name__"]:
        sys.setprofile(None)
        signal.raise_signal(signal.SIGINT)

sys.setprofile(interrupt)
sys.argv[1:] = ["targets", "--json"]
openneutron.__main__.main()
"""


@pytest.mark.parametrize(
    ("module", "function"),
    [("typer", "<module>"), ("typer", "get_command"), ("openneutron.cli.main", "check_values"), ("typer", "invoke")],
)
def test_ctrl_c_before_a_verb_shows_no_traceback(module: str, function: str) -> None:
    """During the imports, while typer makes the commands, and while it parses the arguments."""
    code = INTERRUPTED_EARLY.format(module=module, function=function)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, "", "")


SLOW = """
import os, time
from pathlib import Path

def slow(image):
    Path(os.environ["MARK"]).touch()
    time.sleep(100)
    return image
"""
QUANTIZED = ("net.py:Net", "--weights", "w.pt", "--input", "1,1,8,8", "--recover", "none", "--calibrate", "photos")


@contextlib.contextmanager
def in_its_transform(built: Path, folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Starts a verb in a session of its own, and gives its process when the transform `slow.py:slow` runs.

    OUT in the arguments stands for the empty folder `output` in `folder`.
    """
    (built.parent / "slow.py").write_text(SLOW)
    mark, output = folder / "mark", folder / "output"
    output.mkdir()
    given = [argument.replace("OUT", str(output)) for argument in (*arguments, "--transform", "slow.py:slow")]
    process = subprocess.Popen(
        [sys.executable, "-m", "openneutron", *given],
        cwd=built.parent, env={**os.environ, "MARK": str(mark), "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        while not mark.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals of process groups")
@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize", *QUANTIZED, "--jobs", "2", "-o", "OUT/model.pt2"),
        ("build", *QUANTIZED, "--jobs", "2", "-o", "OUT/new/build"),
        ("evaluate", "out/model.pte", "--evaluate", "labelled", "--jobs", "2"),
        ("validate", "out/model.pte", "--model", "net.py:Net", "--weights", "w.pt", "--calibrate", "photos"),
        ("package", "out/model.pte", "--samples", "photos/left/000.png", "-o", "OUT/firmware"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_ctrl_c_in_a_terminal_ends_all_processes(built: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """A terminal sends the signal to all processes of a command."""
    with in_its_transform(built, tmp_path, *arguments) as process:
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED, out + err
    assert "Traceback" not in out + err
    assert "interrupted." in err
    assert "Failed to load" not in err, "workers log what this process logs"
    assert not list((tmp_path / "output").iterdir())


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize(
    ("signals", "ended"),
    [
        ((signal.SIGTERM,), (143, "ended by SIGTERM.")),
        ((signal.SIGHUP,), (129, "ended by SIGHUP.")),
        ((signal.SIGINT, signal.SIGINT), (INTERRUPTED, "interrupted.")),
        ((signal.SIGTERM, signal.SIGTERM), (143, "ended by SIGTERM.")),
    ],
)
@pytest.mark.parametrize(
    "arguments",
    [
        ("build", *QUANTIZED, "-o", "OUT/new/build"),
        ("evaluate", "out/model.pte", "--evaluate", "labelled", "--jobs", "2"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_signals_that_end_a_process(
    built: Path, tmp_path: Path, arguments: tuple[str, ...], signals: tuple[int, ...], ended: tuple[int, str]
) -> None:
    """Only the process of the verb gets the signals, as from `kill`."""
    if signal.SIG_IGN in map(signal.getsignal, signals):
        pytest.skip("children of a process that ignores a signal ignore it, too, as after nohup")
    with in_its_transform(built, tmp_path, *arguments) as process:
        for number in signals:
            os.kill(process.pid, number)
            time.sleep(0.02)
        out, err = process.communicate(timeout=60)
    assert process.returncode == ended[0], out + err
    assert "Traceback" not in out + err
    assert ended[1] in err
    assert not list((tmp_path / "output").iterdir())


@pytest.mark.parametrize("verb", ["report", "lower", "extract", "run", "init", "targets", "package"])
def test_ctrl_c_while_files_are_written(
    here: Here, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    arguments = {
        "report": (built, "-o", tmp_path / "page.html"),
        "lower": (built / "quantized.pt2", "-o", tmp_path / "model.pte"),
        "extract": (built, "-o", tmp_path / "new" / "extracted"),
        "run": (built, "labelled/left/000.png", "-o", tmp_path / "outputs.npy"),
        "init": (tmp_path / "new.toml",),
        "targets": ("show", "imxrt700", "-o", tmp_path / "board.toml"),
        "package": (built, "-o", tmp_path / "firmware"),
    }
    write_new_file = files._write_new_file

    def interrupted(path: Path, data: bytes, permissions: int | None = None) -> None:
        write_new_file(path, data, permissions)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(files, "_write_new_file", interrupted)
    result = here(verb, *arguments[verb])
    assert result.code == INTERRUPTED, result.text
    assert not list(tmp_path.iterdir())

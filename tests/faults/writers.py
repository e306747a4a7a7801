"""All functions and verbs that write files, each with the files that it writes."""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib.externals.loky import get_reusable_executor
from tests.profiling.test_join_and_fit import Net
from tests.profiling.test_reading import records
from torch import nn

from openneutron import NeutronProgram, QuantizedModel, lower, quantize
from openneutron.accuracy.analyze import analyze
from openneutron.cli import main
from openneutron.core.driver import DUMP_VARIABLE, Driver
from openneutron.data.outputs import save_outputs
from openneutron.errors import OpenNeutronError
from openneutron.page import Summary, summarize
from openneutron.report.extract import extract
from openneutron.vendor import sdk
from openneutron.vendor.device import compile_program
from openneutron.workflow.building import Build, build_folder, write_build

__all__ = ["WRITERS", "Writer"]

DOUBLES = Path(__file__).parents[1] / "doubles"


class CommandError(OpenNeutronError):
    """A verb ended with an exit code other than 0, and printed this message."""


@dataclass(frozen=True)
class Writer:
    """A function that writes files into a folder, in which `before` has made its inputs."""

    write: Callable[[Path], object]
    before: Callable[[Path], object] = lambda _: None
    is_slow: bool = False
    """Whether one call takes more than about a tenth of a second."""
    forks: bool = True
    """Whether it runs in a fork of the process. The threads that render charts do not."""
    numbered: tuple[str, ...] = ()
    """Folders in which each run makes a folder with a new number."""
    wants_new_folder: bool = False
    """Whether the writer refuses a folder that is not empty, such as the folder of an earlier run."""
    optional: tuple[str, ...] = ()
    """Folders whose files may be missing after a failure that the call survives, such as a cache."""


def _data() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, 4, 6, 6) for _ in range(4)]


@functools.cache
def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()


@functools.cache
def _quantized() -> QuantizedModel:
    return quantize(_model(), (_data()[0],), _data(), recover=None)


@functools.cache
def _program() -> NeutronProgram:
    program = lower(_quantized(), payload="portable")
    return replace(program, kernel_selection="// kernels\n" * 99, etrecord=b"etrecord" * 999)


@functools.cache
def _build() -> Build:
    return Build(_quantized(), _program(), summarize("Net", _program(), quantized=_quantized()))


def _write_build(folder: Path) -> None:
    with build_folder(folder / "out") as made:
        write_build(_build(), made)


@functools.cache
def _quantized_file() -> bytes:
    return _quantized().as_file()


def _with_program(folder: Path) -> None:
    (folder / "in.pte").write_bytes(_program().buffer)


def _with_input(folder: Path) -> None:
    _with_program(folder)
    np.save(folder / "x.npy", _data()[0].numpy())


def _with_converter(folder: Path) -> None:
    if str(DOUBLES) not in sys.path:
        sys.path.insert(0, str(DOUBLES))
    _with_program(folder)
    (folder / "parts").mkdir(exist_ok=True)


def _with_parts(folder: Path) -> None:
    (folder / "parts").mkdir(exist_ok=True)


def _compile(folder: Path) -> None:
    converter = sdk.choose_converter(None)
    compiled = compile_program(
        _program().buffer, converter, cache=folder / "cache", intermediates_dir=folder / "parts", what="in.pte"
    )
    assert compiled.payloads


def _verb(*arguments: str) -> Callable[[Path], None]:
    def call(folder: Path) -> None:
        shown = io.StringIO()
        here = Path.cwd()
        os.chdir(folder)
        try:
            with redirect_stdout(shown), redirect_stderr(shown):
                main([*arguments])
        except SystemExit as end:
            if end.code:
                raise CommandError(shown.getvalue()) from end
        finally:
            os.chdir(here)

    return call


def _with_build(folder: Path) -> None:
    (folder / "built").mkdir(exist_ok=True)
    (folder / "built" / "model.pte").write_bytes(_program().buffer)
    (folder / "built" / "summary.json").write_text(_build().summary.as_json())


@functools.cache
def _fitted_model() -> tuple[NeutronProgram, Summary]:
    torch.manual_seed(0)
    data = [torch.randn(1, 8, 16, 16) for _ in range(4)]
    program = lower(quantize(Net().eval(), (data[0],), data, recover=None), payload="portable")
    return program, summarize("Net", program)


def _with_profile(folder: Path) -> None:
    program, summary = _fitted_model()
    (folder / "built").mkdir(exist_ok=True)
    (folder / "built" / "model.pte").write_bytes(program.buffer)
    (folder / "built" / "summary.json").write_text(summary.as_json())
    data = records([layer.cycles // 2 for layer in summary.layers])
    (folder / "board.log").write_text(f"PROFILE 0 0 {data.hex()}\n")


def _lower_with_dumps(folder: Path) -> None:
    lower(_quantized(), payload="portable", intermediates_dir=str(folder / "parts"))


def _dump_two_passes(folder: Path) -> None:
    driver: Driver[str] = Driver("prepare", str, lambda *_: None, folder / "parts")
    for name in ("fold", "fuse"):
        driver.run(name, "a pass", str.upper, "a graph")
    driver.finish()


def _quantize_with_dumps(folder: Path) -> None:
    os.environ[DUMP_VARIABLE] = str(folder / "dumps")
    try:
        quantize(_model(), (_data()[0],), _data(), recover=None)
    finally:
        del os.environ[DUMP_VARIABLE]


@functools.cache
def _analysis() -> Any:
    return analyze(_model(), _quantized(), _data())


def _calibrate_with_jobs(folder: Path) -> None:
    os.environ["JOBLIB_TEMP_FOLDER"] = str(folder)
    try:
        quantized = quantize(_model(), (_data()[0],), _data() * 8, recover=None, jobs=2)
    finally:
        del os.environ["JOBLIB_TEMP_FOLDER"]
        get_reusable_executor().shutdown(wait=True)
    quantized.save(folder / "model.pt2")


WRITERS: dict[str, Writer] = {
    "NeutronProgram.save": Writer(lambda folder: _program().save(folder / "model.pte")),
    "QuantizedModel.save": Writer(lambda folder: _quantized().save(folder / "model.pt2"), is_slow=True),
    "lower(file)": Writer(
        lambda folder: lower(folder / "in.pt2", payload="portable").save(folder / "model.pte"),
        lambda folder: (folder / "in.pt2").write_bytes(_quantized_file()),
        is_slow=True,
    ),
    "dumps of a driver": Writer(_dump_two_passes, _with_parts, numbered=("parts",)),
    "lower(intermediates_dir)": Writer(_lower_with_dumps, _with_parts, is_slow=True, numbered=("parts",)),
    "quantize, dumps": Writer(_quantize_with_dumps, is_slow=True, numbered=("dumps",)),
    "write_build": Writer(_write_build, is_slow=True, forks=False),
    "package": Writer(lambda folder: _program().package(folder / "firmware"), wants_new_folder=True),
    "compile_program, cache": Writer(_compile, _with_converter, is_slow=True, optional=("cache",)),
    "extract": Writer(lambda folder: extract(folder / "in.pte", folder / "out"), _with_program),
    "Model Explorer": Writer(lambda folder: _program().to_model_explorer(folder / "out"), is_slow=True),
    "analysis": Writer(lambda folder: _analysis().save_json(folder / "analysis.json")),
    "outputs": Writer(lambda folder: save_outputs(folder / "out.npz", (torch.ones(9), torch.zeros(3)))),
    "quantize, jobs": Writer(_calibrate_with_jobs, is_slow=True, forks=False),
    "openneutron init": Writer(_verb("init", "openneutron.toml", "--force")),
    "openneutron targets": Writer(_verb("targets", "show", "mimxrt700_evk", "-o", "board.toml")),
    "openneutron report": Writer(
        _verb("report", "built", "-o", "page.html", "--csv", "layers.csv"), _with_build, is_slow=True, forks=False
    ),
    "openneutron extract": Writer(
        _verb("extract", "built", "-o", "out", "--model-explorer"), _with_build, is_slow=True
    ),
    "openneutron compile": Writer(_verb("compile", "in.pte", "-o", "device.pte"), _with_converter, is_slow=True),
    "openneutron package": Writer(
        _verb("package", "in.pte", "-o", "firmware"), _with_program, is_slow=True, wants_new_folder=True
    ),
    "openneutron profile": Writer(
        _verb("profile", "board.log", "--program", "built", "-o", "page.html"), _with_profile, is_slow=True, forks=False
    ),
    "openneutron fit-costs": Writer(
        _verb("fit-costs", "board.log", "--program", "built", "-o", "ours.toml"), _with_profile, is_slow=True
    ),
    "openneutron run": Writer(_verb("run", "in.pte", "x.npy", "-o", "out.npz"), _with_input, is_slow=True),
}

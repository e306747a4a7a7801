"""The command line: output, files, and exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from docs.generators.schemas import SCHEMAS
from tests.cli.builds import Here
from tests.vendor.test_sdk import DOUBLES
from tests.verbs import call_verb
from torch import nn

import openneutron
from openneutron import inspect, lower, quantize
from openneutron.cli.terminal import Terminal
from openneutron.cli.verbs import app
from openneutron.formats import pte
from openneutron.formats.payload import parse
from openneutron.targets import TARGETS

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOUBLES))
    monkeypatch.delenv("NEUTRON_DOUBLE", raising=False)
    monkeypatch.setenv("OPENNEUTRON_CACHE", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.pte, which has a pool on the CPU between two delegates. All its numbers are
    machine-independent.
    """
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.AvgPool2d(2), nn.Conv2d(8, 4, 1)).eval()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.25)
    samples = [(torch.full((1, 3, 8, 8), 1.0),), (torch.full((1, 3, 8, 8), -1.0),)]
    folder = tmp_path_factory.mktemp("programs")
    program = lower(
        quantize(model, samples[0], samples), operators_not_to_delegate=["avg_pool2d"], dump_kernel_selection_code=True
    )
    program.save(folder / "model.pte")
    return folder


Run = Any


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("COLUMNS", "160")
    return lambda *arguments: call_verb(monkeypatch, capsys, *arguments)


class TestTargets:
    def test_targets_lists_all_and_says_that_no_converter_is_installed(self, run: Run) -> None:
        code, text = run("targets")
        assert code == 0
        assert all(name in text for name in TARGETS)
        assert "Converters installed: none; programs stay portable" in text

    @pytest.mark.usefixtures("installed")
    def test_lists_converters(self, run: Run) -> None:
        _, text = run("targets")
        assert "Converters installed: eiq_neutron_sdk unknown, neutron_converter_SDK_25_06 unknown" in text


class TestInspect:
    def test_inspect_equals_the_golden_file(self, run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(folder)
        code, text = run("inspect", "model.pte", "--layers")
        assert code == 0
        assert [line.rstrip() for line in text.splitlines()] == (GOLDEN / "inspect.txt").read_text().splitlines()

    def test_json_of_inspect_equals_the_report(self, run: Run, folder: Path) -> None:
        code, text = run("inspect", folder / "model.pte", "--json", "--target", "mcxn94x")
        assert code == 0
        told, report = json.loads(text), inspect(folder / "model.pte", "mcxn94x")
        jsonschema.validate(told, SCHEMAS["inspect"])
        assert (told["scratch_bytes"], told["weight_bytes"], told["cycles"]) == (
            report.scratch_bytes, report.weight_bytes, report.cycles,
        )  # fmt: skip
        assert [layer["cycles"] for layer in told["estimate"]["layers"]] == [one.cycles for one in report.layers]
        assert told["delegates"][0]["estimate"]["target"] == "mcxn94x"

    @pytest.mark.usefixtures("installed")
    def test_a_device_program_shows_its_header(self, run: Run, folder: Path, tmp_path: Path) -> None:
        run("compile", folder / "model.pte", "-o", tmp_path / "device.pte")
        code, text = run("inspect", tmp_path / "device.pte")
        assert code == 0
        assert "delegate 0: NeutronBackend, device for imxrt700" in text
        for name in ("in  input", "in  delegate0.input0", "out delegate1.output0", "out output0"):
            assert text.count(f"{name}: ") == 1, name
        assert "microcode version 0x1c933f1b, 3 NPU operators; bytes: microcode 78" in text
        assert "estimate for" not in text
        assert "bytes of ExecuTorch: planned" in text

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "is not an ExecuTorch program"),
            (b"\x08\0\0\0ONNX", "bytes 4 and 5 are not b'ET'"),
            (b"\x08\0\0\0ET13", "byte 4: expected the identifier 'ET12'"),
            (bytes(4) + b"TFL3", "byte "),
        ],
    )
    def test_unreadable_files_cause_one_line(self, run: Run, tmp_path: Path, data: bytes, message: str) -> None:
        (tmp_path / "[file]").write_bytes(data)
        code, text = run("inspect", tmp_path / "[file]")
        assert code == 2
        assert message in text
        assert "[file]" in text
        assert "Traceback" not in text

    def test_a_missing_file_and_an_unknown_target_are_refused(self, run: Run, folder: Path) -> None:
        assert run("inspect", folder / "none.pte")[0] == 2
        code, text = run("inspect", folder / "model.pte", "--target", "imx9")
        assert code == 2
        assert "Known targets" in text


class TestCompile:
    def test_compile_without_a_converter_is_refused(self, run: Run, folder: Path, tmp_path: Path) -> None:
        code, text = run("compile", folder / "model.pte", "-o", tmp_path / "device.pte")
        assert code == 2
        assert "installed: none" in text
        assert not list(tmp_path.iterdir())

    @pytest.mark.usefixtures("installed")
    def test_compile_writes_the_program_kernels_and_intermediates(self, run: Run, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "between").mkdir()
        output = tmp_path / "device.pte"
        code, text = run("compile", folder / "model.pte", "-o", output, "--intermediates-dir", tmp_path / "between")
        assert code == 0
        assert "2 device payloads" in text
        delegates = pte.read(output.read_bytes()).methods[0].delegates
        assert [parse(one.payload).is_portable for one in delegates] == [False, False]
        assert len((tmp_path / "device_kernel_selection.c").read_text().splitlines()) == 2
        assert len(list((tmp_path / "between").iterdir())) == 4
        _, text = run("compile", folder / "model.pte", "-o", output, "--json")
        jsonschema.validate(json.loads(text), SCHEMAS["compile"])

    @pytest.mark.usefixtures("installed")
    def test_a_missing_flavour_lists_the_installed_ones(self, run: Run, folder: Path, tmp_path: Path) -> None:
        code, text = run("compile", folder / "model.pte", "-o", tmp_path / "device.pte", "--flavor", "SDK_25_09")
        assert code == 2
        assert "neutron_converter_SDK_25_06" in text

    @pytest.mark.usefixtures("installed")
    def test_device_programs_are_refused(self, run: Run, folder: Path, tmp_path: Path) -> None:
        run("compile", folder / "model.pte", "-o", tmp_path / "device.pte")
        code, text = run("compile", tmp_path / "device.pte", "-o", tmp_path / "again.pte")
        assert code == 2
        assert "is compiled already" in text
        assert not (tmp_path / "again.pte").exists()


class TestDoctor:
    @pytest.mark.usefixtures("installed")
    @pytest.mark.parametrize("flavor", [(), ("--flavor", "SDK_25_06")])
    def test_all_checks_pass(self, run: Run, flavor: tuple[str, ...]) -> None:
        code, text = run("doctor", *flavor)
        assert code == 0
        assert text.count("[ok]") == 6
        assert "kernels in its text: Pad for conv, Conv2DStandardV2 for conv" in text
        assert "All checks passed." in text

    @pytest.mark.usefixtures("installed")
    def test_the_report_has_the_failures(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NEUTRON_DOUBLE", "exit")
        code, text = run("doctor")
        assert code == 1
        assert "[FAILED] convert a convolution for imxrt700" in text
        assert "unsupported operator" in text
        assert "Send this report" in text

    def test_without_a_converter(self, run: Run) -> None:
        code, text = run("doctor")
        assert code == 1
        assert "converters installed: none" in text


def test_help_and_the_module_start_without_torch() -> None:
    code = "import sys; sys.argv[1:] = ['--help']\nfrom openneutron.cli import main\ntry: main()\n"
    code += "finally: print([name for name in ('torch', 'executorch') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip().endswith("[]")
    command = [sys.executable, "-m", "openneutron", "targets"]
    assert "imxrt700" in subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ).stdout


class TestExtract:
    def test_writes_the_models_of_the_delegates(self, run: Run, folder: Path, tmp_path: Path) -> None:
        code, text = run("extract", folder / "model.pte", "-o", tmp_path / "out", "--json")
        assert code == 0
        paths = [Path(path) for path in json.loads(text)["files"]]
        assert [path.name for path in paths] == ["delegate0.tflite", "delegate1.tflite"]
        delegates = pte.read((folder / "model.pte").read_bytes()).methods[0].delegates
        assert [path.read_bytes() for path in paths] == [parse(one.payload).tflite for one in delegates]
        assert run("inspect", paths[0])[0] == 0

    def test_for_model_explorer(self, run: Run, folder: Path, tmp_path: Path) -> None:
        code, text = run("extract", folder / "model.pte", "-o", tmp_path, "--model-explorer")
        assert code == 0
        assert {Path(line).name for line in text.splitlines()} >= {"graphs.json", "cycles.json"}

    @pytest.mark.usefixtures("installed")
    def test_microcode_is_refused(self, run: Run, folder: Path, tmp_path: Path) -> None:
        run("compile", folder / "model.pte", "-o", tmp_path / "device.pte")
        code, text = run("extract", tmp_path / "device.pte", "-o", tmp_path / "out")
        assert code == 2
        assert "holds NPU microcode" in text
        assert not (tmp_path / "out").exists()


class TestOperators:
    @pytest.mark.parametrize("search", ["silu", "aten::silu", "torch.silu", "SILU"])
    def test_finds_an_operator(self, run: Run, search: str) -> None:
        code, text = run("operators", search, "--json")
        assert code == 0
        assert "silu" in [row["name"] for row in json.loads(text)["operators"]]

    def test_limits_depend_on_the_generation_and_the_target(self, run: Run) -> None:
        modern, legacy, other = (
            json.loads(run("operators", "mean", "--json", *more)[1])["operators"]
            for more in ((), ("--flavor", "SDK_25_06"), ("--flavor", "SDK_25_06", "--target", "mcxn94x"))
        )
        count = [sum(len(row["limits"]) for row in rows) for rows in (modern, legacy, other)]
        assert count[0] < count[1] == count[2]
        assert legacy != other

    def test_operators_without_a_name_lists_all(self, run: Run) -> None:
        code, text = run("operators")
        assert code == 0
        assert "FULLY_CONNECTED" in text

    def test_an_unknown_name_is_refused(self, run: Run) -> None:
        code, text = run("operators", "convoluton")
        assert code == 2
        assert "Did you mean 'convolution'" in text


class TestInit:
    def test_writes_a_file_that_build_reads(self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        code, text = run("init")
        assert code == 0
        assert "openneutron build --config openneutron.toml" in text
        assert (tmp_path / "openneutron.toml").read_text().startswith("# Settings of `openneutron build`")

    def test_an_existing_file_is_kept(self, run: Run, tmp_path: Path) -> None:
        file = tmp_path / "openneutron.toml"
        file.write_text("[model]\n")
        code, text = run("init", file)
        assert code == 2
        assert "--force" in text
        assert file.read_text() == "[model]\n"
        assert run("init", file, "--force")[0] == 0
        assert len(file.read_text()) > 1000


@pytest.mark.parametrize("arguments", [["targets"], ["operators"], ["doctor"], ["init", "new.toml"]])
def test_json_follows_the_schema(
    run: Run, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, text = run(*arguments, "--json")
    jsonschema.validate(json.loads(text), SCHEMAS[arguments[0]])


def test_each_verb_has_a_schema() -> None:
    verbs = {command.name for command in app.registered_commands}
    assert verbs == {name.split()[0] for name in SCHEMAS}


def test_json_of_verbs_that_write_files(here: Here, built: Path, tmp_path: Path) -> None:
    """`Result.json` validates the one document on stdout."""
    for verb, arguments in (
        ("report", (built, "-o", tmp_path / "page.html")),
        ("package", (built, "-o", tmp_path / "firmware")),
        ("extract", (built, "-o", tmp_path / "extracted")),
    ):
        result = here(verb, *arguments, "--json")
        assert result.code == 0, result.text
        assert result.json
    result = here("targets", "show", "imxrt700", "-o", tmp_path / "board.toml", "--json")
    jsonschema.validate(json.loads(result.out), SCHEMAS["targets show --output"])


class TestEveryVerb:
    def test_version_and_help(self, run: Run) -> None:
        assert run("--version") == (0, f"openneutron {openneutron.__version__}\n")
        for option in ("-h", "--help"):
            code, text = run(option)
            assert code == 0
            assert "inspect" in text

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["inspct", "x.pte"], "Did you mean 'inspect'"),
            (["inspect"], "Missing argument"),
            (["inspect", "--layer", "x.pte"], "No such option: --layer"),
            (["extract", "x.pte", "-o", "out"], "does not exist"),
        ],
    )
    def test_wrong_use_causes_no_traceback(self, run: Run, arguments: list[str], message: str) -> None:
        code, text = run(*arguments)
        assert code == 2
        assert message in " ".join(text.split())
        assert "Traceback" not in text

    def test_a_fault_is_reported_without_a_traceback(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise ZeroDivisionError("by zero")

        monkeypatch.setattr("openneutron.vendor.doctor.check_converter", fail)
        code, text = run("doctor")
        assert code == 3
        assert "ZeroDivisionError: by zero" in text
        assert "Traceback" not in text
        assert "Traceback" in run("doctor", "--verbose")[1]

    def test_an_interruption_ends_with_130(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("openneutron.vendor.doctor.check_converter", interrupt)
        assert run("doctor")[0] == 130

    def test_targets_as_json(self, run: Run) -> None:
        code, text = run("targets", "--json")
        assert code == 0
        assert [row["name"] for row in json.loads(text)["targets"]] == list(TARGETS)


def test_inspect_does_not_import_the_page(built: Path) -> None:
    code = f"import sys; sys.argv[1:] = ['inspect', {str(built)!r}]\nfrom openneutron.cli import main\n"
    names = ("torch", "jinja2", "openneutron.page.html")
    code += f"try: main()\nfinally: print([name for name in {names} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip().endswith("[]")


def test_json_has_no_infinite_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal(json=True).show("text", {"a": [float("inf"), 1.5], "b": {"c": (float("nan"),)}})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": {"c": [None]}}


@pytest.mark.parametrize("content", [b"", bytes(300)])
def test_a_damaged_program_is_named(here: Here, tmp_path: Path, content: bytes) -> None:
    damaged = tmp_path / "damaged.pte"
    damaged.write_bytes(content)
    for verb in (
        ("report",),
        ("compare", damaged),
        ("extract", "-o", tmp_path / "extracted"),
        ("inspect",),
        ("package", "-o", tmp_path / "package"),
    ):
        ended = here(verb[0], damaged, *verb[1:])
        assert ended.code == 2
        assert "damaged.pte' is not an ExecuTorch program" in ended.err
        assert "expected a the" not in ended.err

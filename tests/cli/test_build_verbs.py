"""The verbs that convert a model to a program: right use, wrong use, files, JSON.

Tests that compare bytes or read all output of a process start processes; the others call the verbs in this process.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.cli.builds import MODEL, SOURCE, Here, run
from torch import nn

from openneutron.page import Summary
from openneutron.page.layer_table import COLUMNS


class TestBuild:
    def test_writes_the_files_and_a_summary(self, built: Path) -> None:
        names = {path.name for path in built.iterdir()}
        assert names == {"model.pte", "quantized.pt2", "report.html", "summary.json", "openneutron.toml"}
        summary = json.loads((built / "summary.json").read_text())
        assert [row["name"] for row in summary["accuracy"]] == ["float", "int8", ".pte"]
        assert [row["samples"] for row in summary["accuracy"]] == [40, 40, 40]
        assert summary["program_bytes"] == (built / "model.pte").stat().st_size
        assert {row["reference"] for row in summary["validation"]} == {"float", "int8"}
        assert summary["analysis"] is not None

    @pytest.mark.slow
    def test_ends_with_a_table(self, work: Path, built: Path) -> None:
        result = run(work, "build", "--config", built / "openneutron.toml", "-o", "again", "--no-analyze")
        assert result.code == 0, result.text
        for text in ("float", "int8", ".pte", "95 % interval", "on the NPU in 1 delegate", "cycles", "next:"):
            assert text in result.out
        assert "quantize: " in result.err

    @pytest.mark.slow
    def test_the_settings_of_a_build_give_equal_bytes_elsewhere(self, work: Path, built: Path) -> None:
        result = run(work, "build", "--config", "out/openneutron.toml", "-o", "deep/er/copy", "-q", "--json")
        assert result.code == 0, result.text
        assert result.err == ""
        for name in ("model.pte", "summary.json", "report.html", "quantized.pt2"):
            assert (work / "deep/er/copy" / name).read_bytes() == (built / name).read_bytes(), name

    @pytest.mark.slow
    def test_the_bytes_do_not_depend_on_the_place_of_the_project(self, work: Path, built: Path, tmp_path: Path) -> None:
        shutil.copytree(work, tmp_path / "else/where", ignore=shutil.ignore_patterns("deep", "again", "other"))
        (tmp_path / "dumps").mkdir()
        options = ("-c", "where/out/openneutron.toml", "-o", "third", "-q", "--intermediates-dir", tmp_path / "dumps")
        moved = run(tmp_path / "else", "build", *options)
        assert moved.code == 0, moved.text
        for name in ("model.pte", "quantized.pt2"):
            assert (tmp_path / "else/third" / name).read_bytes() == (built / name).read_bytes(), name
        assert str(work).encode() not in (built / "quantized.pt2").read_bytes()

    @pytest.mark.slow
    def test_random_inputs_estimate_memory_and_time(self, work: Path, here: Here, built: Path, tmp_path: Path) -> None:
        exported = torch.export.export(nn.Conv2d(1, 4, 3), (torch.zeros(1, 1, 8, 8),))
        torch.export.save(exported, work / "exported.pt2")
        for number, model in enumerate((MODEL, ("exported.pt2",))):
            output = tmp_path / str(number)
            result = here("build", *model, "--calibrate", "random", "-o", output, "--json")
            assert result.code == 0, result.text
            assert "only its memory and time are valid" in result.json["verdict"]["sentence"]
            assert result.json["analysis"] is None
            assert result.json["recipe"] == {}
        of_data = json.loads((built / "summary.json").read_text())
        of_random = json.loads((tmp_path / "0" / "summary.json").read_text())
        assert of_random["cycles"] == of_data["cycles"]
        assert of_random["memory"]["needed_bytes"] == of_data["memory"]["needed_bytes"]
        assert 'calibrate = "random"' in (tmp_path / "0" / "openneutron.toml").read_text()
        assert here("validate", tmp_path / "0", "--max-lsb", "1").code == 0

    @pytest.mark.slow
    def test_options_replace_settings(self, work: Path, built: Path) -> None:
        options = ("--keep-float", "head", "--target", "mcxn94x", "--recover", "none", "--no-analyze", "--int8-io")
        result = run(
            work, "build", "-c", "out/openneutron.toml", *options, "-o", "other", "--json", "--date", "2020-02-02"
        )
        assert result.code == 0, result.text
        assert result.json["target"]["name"] == "mcxn94x"
        assert result.json["date"] == "2020-02-02"
        assert [row["op"] for row in result.json["placement"] if row["where"] == "cpu"]
        assert 'keep_float = ["head"]' in (work / "other/openneutron.toml").read_text()
        assert (built / "openneutron.toml").read_text() != (work / "other/openneutron.toml").read_text()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "Give a model: MODEL"),
            (["net.py:Net"], "Give data for calibration: --calibrate DATA"),
            (["net.py:Nett", "--calibrate", "photos"], "Did you mean 'Net'"),
            (["nett.py:Net", "--calibrate", "photos"], "Did you mean 'net.py'"),
            (["net.py:Net", "--calibrate", "photo"], "Did you mean 'photos'"),
            (["net.py:Net", "--calibrate", "photos"], "Give the shape of each input: --input"),
            (["net.py:Net", "--calibrate", "photos", "--input", "1,a"], "An input is a shape"),
            (["net.py:Net", "--calibrate", "photos", "--input", "1,1,8,8", "--target", "imx7"], "Known targets"),
            (["net.py:Net", "--calibrate", "photos", "--recover", "bset"], "Did you mean 'best'"),
            (["net.py:Net", "--calibrate", "photos", "--layers", "head"], "MODULE=float"),
            (["net.py:Net", "--calibrate", "photos", "--resize", "1.5"], "whole numbers of pixels"),
            (["net.py:Net", "--calibrate", "photos", "--resize", "nan"], "'resize' takes numbers"),
            (["net.py:Net", "--calibrate", "photos", "--date", "today"], "has the form YYYY-MM-DD"),
            (["net.py:Net", "--calibrate", "photos", "--intermediates-dir", "none"], "'none' does not exist"),
            (["net.py:Net", "--calibrate", "photos", "--mean", "123", "--std", "50"], "Divide mean by 255"),
            (["net.py:Net", "--calibrate", "photos", "--weights", "v.pt"], "weights: 'v.pt' does not exist"),
            (["net.py:Net", "--calibrate", "photos", "--weigths", "w.pt"], "--weights"),
            (["net.py:Net", "--calibrate", "photos", "--metric", "top6"], "Did you mean 'top5'"),
            (["net.py:Net", "--config", "none.toml"], "none.toml"),
            ([*MODEL, "--calibrate", "net.py"], "net.py"),
        ],
    )
    def test_wrong_use_is_refused_before_anything_is_written(
        self, here: Here, tmp_path: Path, arguments: list[str], message: str
    ) -> None:
        result = here("build", *arguments, "-o", tmp_path / "out")
        assert result.code == 2, result.text
        assert message in " ".join(result.text.replace("│", " ").split())
        assert not list(tmp_path.rglob("*.*"))

    def test_a_file_in_the_place_of_the_folder(self, work: Path) -> None:
        result = run(work, "build", *MODEL, "--calibrate", "photos", "-o", "net.py")
        assert result.code == 2
        assert "Cannot write 'net.py': it is an input of this command." in result.err

    @pytest.mark.slow
    def test_an_interruption_leaves_no_files(self, work: Path, tmp_path: Path) -> None:
        (work / "slow.py").write_text(
            "import os, signal\ndef data():\n    os.kill(os.getpid(), signal.SIGINT)\n    yield 1\n"
        )
        result = run(work, "build", *MODEL, "--calibrate", "slow.py:data", "-o", tmp_path / "out")
        assert result.code == 130
        assert "interrupted" in result.err
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
class TestSteps:
    def test_quantize_and_lower_give_the_program_of_build(
        self, work: Path, here: Here, built: Path, tmp_path: Path
    ) -> None:
        quantized, program = tmp_path / "m.pt2", tmp_path / "m.pte"
        result = run(
            work, "quantize", *MODEL, "--calibrate", "photos", "--target", "imxrt700", "-o", quantized, "--json"
        )
        assert result.code == 0, result.text
        found = result.json
        assert (found["file"], found["target"]) == (str(quantized), "imxrt700")
        assert (found["int8_operators"], found["operators"]) == (5, 5)
        assert found["inputs"] == [{"name": "x", "dtype": "float32", "shape": [1, 1, 8, 8], "value": None}]
        assert found["recipe"]["correction"] == "weights"
        assert quantized.read_bytes() == (built / "quantized.pt2").read_bytes()
        result = run(work, "lower", quantized, "-o", program, "--json")
        assert result.code == 0, result.text
        assert (result.json["on_cpu"], result.json["bytes"]) == (0, program.stat().st_size)
        assert here("compare", program, built).code == 0

    def test_lower_takes_the_folder_of_a_build_and_its_settings(self, here: Here, built: Path, tmp_path: Path) -> None:
        folder = tmp_path / "build"
        shutil.copytree(built, folder)
        assert here("lower", folder, "-o", tmp_path / "same.pte").code == 0
        assert (tmp_path / "same.pte").read_bytes() == (built / "model.pte").read_bytes()
        (folder / "openneutron.toml").write_text("[lower]\nint8_io = true\n")
        assert here("lower", folder, "-o", tmp_path / "int8.pte").code == 0
        assert (tmp_path / "int8.pte").read_bytes() != (built / "model.pte").read_bytes()

    def test_lower_takes_the_target_of_the_file(self, here: Here, tmp_path: Path) -> None:
        options = ("--calibrate", "photos", "--target", "mcxn94x", "--recover", "none")
        assert here("quantize", *MODEL, *options, "-o", tmp_path / "m.pt2").code == 0
        assert here("lower", tmp_path / "m.pt2", "-o", tmp_path / "m.pte", "--json").json["target"] == "mcxn94x"

    def test_wrong_files_are_refused(self, here: Here, tmp_path: Path) -> None:
        assert "written as .pt2" in here("quantize", *MODEL, "--calibrate", "photos", "-o", "m.pt").err
        result = here("lower", "w.pt", "-o", tmp_path / "m.pte")
        assert (result.code, "not a quantized model (.pt2)" in result.err) == (2, True)
        assert here("lower", "none.pt2", "-o", tmp_path / "m.pte").code == 2
        result = here("quantize", *MODEL, "--calibrate", "photos", "-o", "none/m.pt2")
        assert "the folder 'none' does not exist" in result.err
        assert not list(tmp_path.iterdir())

    def test_analyze(self, here: Here, built: Path) -> None:
        arguments = ("--calibrate", "photos", "--samples", "4", "--json")
        model = ("--model", *MODEL)
        found = here("analyze", *model, *arguments, "--quantized", built / "quantized.pt2")
        assert found.code == 0, found.text
        assert found.json["output_sqnr_db"] > 20
        again = here("analyze", *model, *arguments)
        assert again.json["output_sqnr_db"] == pytest.approx(found.json["output_sqnr_db"], abs=0.01)


@pytest.mark.slow
class TestChecks:
    def test_run(self, work: Path, here: Here, built: Path, tmp_path: Path) -> None:
        (work / "labels.txt").write_text("left\nright\n")
        options = ("--labels", "labels.txt", "--top", "1", "--repeat", "3", "-o", tmp_path / "out.npz", "--json")
        result = here("run", built, "labelled/left/000.png", "labelled/right/000.png", *options)
        assert result.code == 0, result.text
        assert [one["classes"][0][0]["name"] for one in result.json["runs"]] == ["left", "right"]
        assert all(one["seconds"] > 0 for one in result.json["runs"])
        assert sorted(np.load(tmp_path / "out.npz")) == ["run0.output0", "run1.output0"]
        table = here("run", built / "model.pte", "labelled/left/000.png", "--mean", "0.4", "--std", "0.2")
        assert "float32" in table.out, table.text

    @pytest.mark.parametrize(
        ("names", "expected"),
        [
            (("--labels", "swapped.txt"), ["right", "left"]),
            ((), ["left", "right"]),
        ],
    )
    def test_run_names_the_classes_of_the_build(
        self, work: Path, here: Here, built: Path, names: tuple[str, ...], expected: list[str]
    ) -> None:
        (work / "swapped.txt").write_text("right\nleft\n")
        result = here("run", built, "labelled/left/000.png", "labelled/right/000.png", *names, "--json")
        assert result.code == 0, result.text
        assert [one["classes"][0][0]["name"] for one in result.json["runs"]] == expected

    @pytest.mark.parametrize("folders", [("left", "middle", "right"), ()])
    def test_run_names_no_classes_by_labelled_data_that_changed(
        self, work: Path, here: Here, built: Path, tmp_path: Path, folders: tuple[str, ...]
    ) -> None:
        (tmp_path / "changed").mkdir()
        for name in folders:
            shutil.copytree(work / "labelled/left", tmp_path / "changed" / name)
        settings = tmp_path / "changed.toml"
        settings.write_text('[data]\nevaluate = "changed"\nmean = [0.4]\nstd = [0.2]\n')
        result = here("run", built, "labelled/left/000.png", "--config", settings, "--json")
        assert result.code == 0, result.text
        assert result.json["runs"][0]["classes"] is None

    def test_run_refuses_another_number_of_given_names(self, work: Path, here: Here, built: Path) -> None:
        (work / "three.txt").write_text("left\nmiddle\nright\n")
        result = here("run", built, "labelled/left/000.png", "--labels", "three.txt")
        assert result.code == 2, result.text
        assert "The labels name 3 classes, but the output has 2. Give the names of all classes." in result.text

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["none.png"], "none.png"),
            (["labelled/left/000.png", "-o", "x.txt"], ".npy or a .npz file"),
            (["labelled/left/000.png", "labelled/left/001.png", "-o", "x.npy"], "need a .npz file"),
            (["net.py"], "net.py"),
            ([], "Missing argument"),
        ],
    )
    def test_wrong_use_of_run(self, here: Here, built: Path, arguments: list[str], message: str) -> None:
        result = here("run", built, *arguments)
        assert result.code == 2, result.text
        assert message in result.text

    def test_validate_a_build(self, here: Here, built: Path) -> None:
        result = here("validate", built, "--min-sqnr", "20", "--max-lsb", "2", "--json")
        assert result.code == 0, result.text
        assert result.json["passed"]
        assert {row["reference"] for row in result.json["outputs"]} == {"float", "int8"}
        assert result.json["layers"]["layers"]

    def test_validate_fails_beyond_a_limit(self, here: Here, built: Path) -> None:
        result = here("validate", built, "--min-sqnr", "99")
        assert result.code == 1
        assert "FAILED: Output 'output0' has" in result.out

    def test_validate_a_program_on_random_inputs(self, here: Here, built: Path) -> None:
        result = here("validate", built / "model.pte", "--model", "net.py:Net", "--weights", "w.pt", "--json")
        assert result.code == 0, result.text
        assert result.json["samples"] == 16
        assert "needs the float model" in here("validate", built / "model.pte").err

    def test_a_moved_build_runs_without_its_model_and_data(self, here: Here, built: Path, tmp_path: Path) -> None:
        moved = tmp_path / "deep" / "moved"
        shutil.copytree(built, moved)
        assert here("run", moved, "labelled/left/000.png", "--json").code == 0

    def test_json_is_the_only_output_of_a_model_that_prints(self, work: Path, tmp_path: Path) -> None:
        (work / "loud.py").write_text(SOURCE.replace("        super()", "        print('made')\n        super()"))
        options = ("--calibrate", "photos", "--recover", "none", "-o", tmp_path / "m.pt2", "--json", "--channels-last")
        result = run(work, "quantize", "loud.py:Net", *MODEL[1:], *options)
        assert result.code == 0, result.text
        assert result.json["target"] == "imxrt700"
        assert "made" in result.err

    def test_verbose_tells_what_is_read(self, work: Path, built: Path) -> None:
        quiet, verbose = (run(work, "evaluate", built, *options).err for options in ((), ("-v",)))
        for text in (
            "net.py:Net: 170 parameters, weights of ",
            "Evaluation: 40 samples of ",
            "labelled/right/019.png, 2 classes: left, right.",
            " Transform: ImageTransform(",
        ):
            assert text in verbose
            assert text not in quiet
        assert not [line for line in verbose.splitlines() if line.startswith(("torch.", "torchao", "executorch"))]

    def test_evaluate_a_build(self, here: Here, built: Path) -> None:
        result = here("evaluate", built, "--json")
        assert result.code == 0, result.text
        summary = json.loads((built / "summary.json").read_text())
        assert result.json["accuracy"] == summary["accuracy"]
        table = here("evaluate", built / "model.pte", "--evaluate", "labelled", "--mean", "0.4", "--std", "0.2")
        assert table.code == 0, table.text
        assert "top1" in table.out

    def test_evaluate_by_a_function(self, here: Here, built: Path) -> None:
        result = here("evaluate", built, "--metric", "net.py:metric", "--json", "--evaluation-samples", "8")
        assert result.code == 0, result.text
        assert {row["samples"] for row in result.json["accuracy"]} == {8}

    def test_evaluate_needs_labelled_data(self, here: Here, built: Path) -> None:
        result = here("evaluate", built / "model.pte")
        assert (result.code, "--evaluate DATA" in result.err) == (2, True)

    def test_report_writes_a_table_of_operators(self, here: Here, built: Path, tmp_path: Path) -> None:
        result = here("report", built, "-o", tmp_path / "page.html", "--csv", tmp_path / "layers.csv", "--json")
        assert result.json["csv"] == str(tmp_path / "layers.csv")
        summary = Summary.from_json((built / "summary.json").read_bytes(), "summary.json")
        with (tmp_path / "layers.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [tuple(row) for row in rows] == [COLUMNS] * len(summary.layers)
        for position, (row, layer) in enumerate(zip(rows, summary.layers, strict=True)):
            assert row["position"] == str(position)
            assert (row["node"], row["module"]) == (layer.node or "", layer.module or "")
            assert (int(row["cycles"]), int(row["weight_bytes"])) == (layer.cycles, layer.weight_bytes)
        assert summary.analysis is not None
        shown = {row["node"]: row["sqnr_db"] for row in rows if row["sqnr_db"]}
        assert shown
        assert {one.node: str(one.sqnr_db) for one in summary.analysis.layers if one.node in shown} == shown

    def test_the_page_and_the_table_of_a_report_have_different_names(self, here: Here, built: Path) -> None:
        result = here("report", built, "-o", "same.html", "--csv", "./same.html")
        assert (result.code, "Give two names" in result.err) == (2, True)
        result = here("report", built, "--csv", built / "quantized.pt2")
        assert (result.code, "it is an input of this command" in result.err) == (2, True)

    def test_report_replaces_the_page_of_the_build(self, here: Here, built: Path) -> None:
        page = (built / "report.html").read_bytes()
        assert here("report", built, "-o", built / "report.html").code == 0
        assert (built / "report.html").read_bytes() == page

    def test_report(self, here: Here, built: Path, tmp_path: Path) -> None:
        assert here("report", built, "-o", tmp_path / "page.html").code == 0
        assert (tmp_path / "page.html").read_bytes() == (built / "report.html").read_bytes()
        result = here("report", built / "model.pte", "--other", built, "-o", tmp_path / "two.html")
        assert result.code == 0, result.text
        assert "<html" in (tmp_path / "two.html").read_text()

    def test_compare(self, here: Here, built: Path, tmp_path: Path) -> None:
        result = here("compare", built, built / "model.pte", "--json")
        assert result.code == 0, result.text
        assert all(row["largest"] == 0 for row in result.json["outputs"])
        torch.export.save(torch.export.export(nn.Linear(3, 3), (torch.zeros(1, 3),)), tmp_path / "n.pt2")
        shutil.copy(tmp_path / "n.pt2", tmp_path / "n.pte")
        assert here("compare", built, tmp_path / "n.pte").code == 2

    def test_inspect_and_extract_take_the_folder_of_a_build(self, here: Here, built: Path, tmp_path: Path) -> None:
        assert here("inspect", built, "--json").json["format"] == "pte"
        result = here("extract", built, "-o", tmp_path, "--model-explorer", "--json")
        assert {Path(path).name for path in result.json["files"]} >= {"delegate0.tflite", "placement.json"}

    def test_a_folder_without_a_program(self, here: Here) -> None:
        result = here("validate", "photos")
        assert (result.code, "has no model.pte" in result.err) == (2, True)

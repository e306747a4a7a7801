"""The table of passes, and their driver."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.models import Model, conv, image
from torch.fx import GraphModule

from openneutron import lower, passes, quantize
from openneutron.core.driver import DUMP_VARIABLE
from openneutron.errors import ModelError
from openneutron.ir import build as ir
from openneutron.passes.table import PASSES, Pass, Setting, When, run_passes
from openneutron.targets import TARGETS

TARGET = TARGETS["imxrt700"]


def module() -> GraphModule:
    model = Model(lambda m, x: torch.relu_(m.c(x)), c=conv()).eval()
    exported: GraphModule = torch.export.export(model, (image(),)).module()
    return exported


def changes(graph: GraphModule) -> bool:
    return bool(graph.graph.nodes)


def keeps(graph: GraphModule) -> bool:
    return not graph.graph.nodes


def asks(graph: GraphModule, target: object, *, training: bool) -> bool:
    assert target is TARGET
    return training


def breaks(graph: GraphModule) -> bool:
    node = next(node for node in graph.graph.nodes if node.op == "call_function")
    node.name = "same"
    node.next.name = "same"
    return True


def names(rows: list[Pass], *, training: bool = False) -> list[str]:
    return [run.name for run in run_passes(rows, module(), Setting(TARGET, training), "test")]


def test_every_pass_has_a_name_and_a_purpose() -> None:
    for name, purpose in [
        *((row.name, row.purpose) for row in PASSES),
        *((row.name, row.purpose) for row in ir.PASSES),
    ]:
        assert name.isidentifier()
        assert purpose
        assert "\n" not in purpose


def test_every_pass_of_the_package_is_in_the_table() -> None:
    """Finds each public function of `openneutron.passes` that takes a module and returns whether it changed it."""
    given = {name for name in passes.__all__ if name not in ("PASSES", "prepare", "run_passes")}
    assert given <= {row.name for row in PASSES}


@pytest.mark.parametrize(
    ("row", "calibrated", "trained"),
    [
        (Pass(keeps, "p"), True, True),
        (Pass(keeps, "p", When.CALIBRATION), True, False),
        (Pass(keeps, "p", When.TRAINING), False, True),
    ],
)
def test_a_pass_runs_when_its_row_says(row: Pass, calibrated: bool, trained: bool) -> None:
    assert names([row]) == ["keeps"] * calibrated
    assert names([row], training=True) == ["keeps"] * trained


@pytest.mark.parametrize(("first", "runs"), [(changes, True), (keeps, False)])
def test_a_pass_can_depend_on_the_change_of_another(first: Callable[[GraphModule], bool], runs: bool) -> None:
    rows = [Pass(first, "p"), Pass(asks, "p", after_change_by=first)]
    assert names(rows) == [first.__name__, *["asks"] * runs]


def test_a_pass_gets_the_arguments_that_its_parameters_name() -> None:
    assert Pass(asks, "p")(module(), Setting(TARGET, training=True))
    assert not Pass(asks, "p")(module(), Setting(TARGET))


def test_a_graph_that_a_pass_broke_is_found() -> None:
    with pytest.raises(RuntimeError, match="same"):
        names([Pass(breaks, "p")])


def test_in_training_a_pass_that_drops_a_parameter_is_refused() -> None:
    def drops(graph: GraphModule) -> bool:
        for node in graph.graph.nodes:
            if node.op == "call_function" and "conv" in str(node.target):
                node.replace_all_uses_with(node.args[0])
        return graph.graph.eliminate_dead_code()

    with pytest.raises(ModelError, match="would not be trained"):
        names([Pass(drops, "p", keeps_parameters=True)], training=True)
    assert names([Pass(drops, "p", keeps_parameters=True)]) == ["drops"]


def test_a_model_is_dumped_after_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DUMP_VARIABLE, str(tmp_path / "variable"))
    model = Model(lambda m, x: torch.relu_(m.c(x)), c=conv()).eval()
    quantized = quantize(model, (image(),), [image()], recover=None)
    monkeypatch.delenv(DUMP_VARIABLE)
    lower(quantized, intermediates_dir=str(tmp_path))
    dumps = {path.name.split("_", 1)[1]: path for path in sorted((tmp_path / "variable").iterdir(), reverse=True)}
    assert "aten.relu_.default(" in (dumps["prepare"] / "10_functionalize_before.txt").read_text()
    assert "aten.relu_.default(" not in (dumps["prepare"] / "10_functionalize_after.txt").read_text()
    assert "functionalize: write in-place" in (dumps["prepare"] / "passes.txt").read_text()
    lowered = {path.name.split("_", 1)[1]: path for path in (tmp_path / "passes").iterdir()}
    assert {"place", "ir_conv2d"} <= lowered.keys()
    assert "CONV_2D" in (lowered["ir_conv2d"] / "00_merge_slices_before.txt").read_text()
    assert (lowered["place"] / "01_propagate_qdq_after.txt").exists()

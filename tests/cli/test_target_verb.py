"""The verb `targets`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from docs.generators.schemas import SCHEMAS
from tests.verbs import call_verb

from openneutron import NeutronTargetSpec


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command. Returns the exit code and the output."""
    monkeypatch.setenv("COLUMNS", "160")
    return lambda *arguments: call_verb(monkeypatch, capsys, *arguments)


class TestVerb:
    def test_show(self, run: Any, tmp_path: Path) -> None:
        code, text = run("targets", "show", "frdm_mcxn947")
        assert code == 0
        assert "0x20000000" in text
        assert "nxp_mcxn94x_common.dtsi (sram0)" in text
        file = tmp_path / "board.toml"
        file.write_text('based_on = "imxrt700"\n[costs]\noperator_cycles = 1000\n')
        code, text = run("targets", "show", file, "--json")
        told = json.loads(text)
        jsonschema.validate(told, SCHEMAS["targets show"])
        assert (told["name"], told["board"]["name"], told["costs"]["operator_cycles"]) == ("imxrt700", "board", 1000)
        assert run("targets", "show", "imx943")[1].count("unknown") >= 3

    def test_show_writes_a_board_file(self, run: Any, tmp_path: Path) -> None:
        for name in ("imx95_evk", "mcxn54x"):
            assert run("targets", "show", name, "-o", tmp_path / "b.toml")[0] == 0
            assert NeutronTargetSpec(tmp_path / "b.toml").name == NeutronTargetSpec(name).name

    @pytest.mark.parametrize("arguments", [("shw", "imx95"), ("show",), ("--output", "b.toml")])
    def test_wrong_use(self, run: Any, arguments: tuple[str, ...]) -> None:
        code, text = run("targets", *arguments)
        assert code == 2
        assert "openneutron targets show NAME" in text

"""Boards: the files that OpenNeutron has, board files of users, and every place that takes a target."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import openneutron
from openneutron import NeutronPartitioner, NeutronQuantizer, NeutronTargetSpec, generate_neutron_compile_spec
from openneutron.compile_spec import CompileOptions
from openneutron.errors import InputError, TargetError
from openneutron.ir.kinds import Work
from openneutron.ops.support import supported_operators
from openneutron.page import summarize
from openneutron.settings import Settings, read_settings
from openneutron.settings.checks import check_settings
from openneutron.settings.toml import write_settings
from openneutron.targets import COMPUTE_KINDS, ROLES, TARGETS, Board, Costs, boards, read_board, text_of_board

ROOT = Path(__file__).parents[2]
SMALL = """
title = "My board"
based_on = "imxrt700"

[[regions]]
name = "sram"
kind = "SRAM"
start = 0x2000_0000
bytes = 1_000_000
npu_reads = true
reserved_bytes = 200_000
source = "UM1234, table 5"

[[regions]]
name = "flash"
kind = "flash"
bytes = 3_000_000

[placement]
program = ["sram", "flash"]
planned = "sram"

[clocks]
npu_hz = 200_000_000

[costs]
operator_cycles = 1000
bytes_per_cycle = 2.5
source = "profile of 2026-11-20"

[costs.compute]
convolution = 1.5
"""


SUMS: tuple[tuple[str, str, int, int | None, int], ...] = (
    ("frdm_imx95", "imx95", 8_589_934_592, None, 1_000_000_000),
    ("frdm_mcxn947", "mcxn94x", 425_984, 10_485_760, 150_000_000),
    ("imx95_evk", "imx95", 17_179_869_184, None, 1_000_000_000),
    ("mcx_n9xx_evk", "mcxn94x", 425_984, 10_485_760, 150_000_000),
    ("mimxrt700_evk", "imxrt700", 7_864_320, 67_108_864, 325_000_000),
)
"""The name, the chip, the bytes of RAM and flash, and the clock in Hz of each board of the package."""


@pytest.fixture
def board_file(tmp_path: Path) -> Path:
    path = tmp_path / "board.toml"
    path.write_text(SMALL)
    return path


class TestShippedBoards:
    def test_each_file_is_a_board_of_its_name(self) -> None:
        """`SUMS` has the names, so that a file that is deleted by mistake makes the test fail."""
        assert sorted(boards()) == sorted(name for name, *_ in SUMS)

    @pytest.mark.parametrize("board", boards().values(), ids=boards().keys())
    def test_each_number_has_a_source(self, board: Board) -> None:
        assert board.title
        assert board.chip in TARGETS
        for region in board.regions:
            assert region.source or (region.bytes is None and region.start is None), region
        assert board.placement.source
        assert board.clocks.source
        assert all(board.may_hold(role) for role in ROLES)

    @pytest.mark.parametrize("board", boards().values(), ids=boards().keys())
    def test_text_is_read_as_the_same_board(self, board: Board, tmp_path: Path) -> None:
        path = tmp_path / "copy.toml"
        path.write_text(text_of_board(board))
        assert read_board(path) == board

    @pytest.mark.parametrize(("name", "chip", "sram_bytes", "flash_bytes", "clock_hz"), SUMS)
    def test_the_target_has_the_sums_and_the_clock_of_the_board(
        self, name: str, chip: str, sram_bytes: int, flash_bytes: int | None, clock_hz: int
    ) -> None:
        target = NeutronTargetSpec(name).neutron_target
        assert (target.name, target.label) == (chip, name)
        assert (target.sram_bytes, target.flash_bytes, target.clock_hz) == (sram_bytes, flash_bytes, clock_hz)


class TestFile:
    def test_is_read(self, board_file: Path) -> None:
        spec = NeutronTargetSpec(board_file)
        target, board = spec.neutron_target, spec.board
        assert board is not None
        assert (spec.name, board.name, board.title) == ("imxrt700", "board", "My board")
        assert (target.sram_bytes, target.flash_bytes, target.clock_hz) == (800_000, 3_000_000, 200_000_000)
        assert target.costs == Costs(1000, 2.5, compute=(("convolution", 1.5),), source="profile of 2026-11-20")
        assert target.macs_per_pipeline == 8
        assert board.region("flash").start is None
        assert [one.name for one in board.may_hold("temporary")] == ["sram"]
        assert pickle.loads(pickle.dumps(spec)) == spec
        assert hash(spec) == hash(NeutronTargetSpec(str(board_file)))
        assert spec != NeutronTargetSpec("imxrt700") == spec.chip

    def test_an_unknown_size_makes_the_sum_unknown(self, tmp_path: Path) -> None:
        path = tmp_path / "b.toml"
        path.write_text('based_on = "imx95"\n[[regions]]\nname = "ddr"\nkind = "DDR"\n')
        assert NeutronTargetSpec(path).neutron_target.sram_bytes is None

    def test_a_board_of_unknown_clock_has_the_clock_of_its_chip(self, tmp_path: Path) -> None:
        path = tmp_path / "b.toml"
        path.write_text('based_on = "imx95"\n[clocks]\ncpu_hz = 500_000_000\n')
        assert NeutronTargetSpec(path).neutron_target.clock_hz == TARGETS["imx95"].clock_hz == 1_000_000_000

    def test_a_file_extends_a_board_and_another_file(self, board_file: Path) -> None:
        second = board_file.with_name("second.toml")
        second.write_text(
            'based_on = "board.toml"\n[[regions]]\nname = "sram"\nkind = "SRAM"\nbytes = 500\n'
            "[costs]\nbytes_per_cycle = 4\n[costs.compute]\nsoftmax = 2\n"
        )
        board = read_board(second)
        assert (board.name, board.chip, board.title) == ("second", "imxrt700", "My board")
        assert [(one.name, one.bytes) for one in board.regions] == [("sram", 500), ("flash", 3_000_000)]
        assert board.costs.operator_cycles == 1000
        assert (board.costs.bytes_per_cycle, board.costs.compute) == (4, (("convolution", 1.5), ("softmax", 2)))
        third = board_file.with_name("third.toml")
        third.write_text('based_on = "frdm_mcxn947"\n')
        assert read_board(third).regions == boards()["frdm_mcxn947"].regions

    def test_regions_of_the_file_and_of_its_base_must_not_overlap(self, board_file: Path) -> None:
        second = board_file.with_name("second.toml")
        text = 'based_on = "board.toml"\n[[regions]]\nname = "{}"\nkind = "SRAM"\nstart = {:#x}\nbytes = 500\n'
        second.write_text(text.format("pool", 0x2000_1000))
        with pytest.raises(TargetError, match=r"second\.toml.*'sram' and 'pool' overlap at address 0x20001000"):
            read_board(second)
        second.write_text(text.format("sram", 0x2000_1000))
        assert read_board(second).region("sram").start == 0x2000_1000
        second.write_text(text.format("pool", 0x2000_0000 + 1_000_000))
        assert [one.name for one in read_board(second).regions] == ["sram", "flash", "pool"]

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ('based_on = "imxrt700"', "", r"board\.toml': the key 'based_on' is missing"),
            ('"imxrt700"', '"imxrt70"', r"'based_on' names a chip.* not 'imxrt70'\. Did you mean 'imxrt700'"),
            ('"imxrt700"', "7", r"'based_on' takes a text, not 7"),
            ("title", "titel", r"unknown key 'titel'\. Did you mean 'title'"),
            ("npu_reads", "npu_read", r"\[\[regions\]\] 1: unknown key 'npu_read'\. Did you mean 'npu_reads'"),
            ("npu_reads = true", "npu_reads = 1", r"\[\[regions\]\] 1: 'npu_reads' takes true or false, not 1"),
            ('kind = "flash"', 'kind = "Flash"', r"2: 'kind' is one of SRAM.* not 'Flash'\. Did you mean 'flash'"),
            ("bytes = 3_000_000", "bytes = -3", r"\[\[regions\]\] 2: 'bytes' takes an integer from 1 .* not -3"),
            ("bytes = 3_000_000", "bytes = true", r"'bytes' takes an integer"),
            ("bytes = 3_000_000", 'bytes = "3 MB"', r"'bytes' takes an integer .* not '3 MB'"),
            (
                "bytes = 3_000_000",
                "start = 0x2000_1000\nbytes = 10",
                r"'sram' and 'flash' overlap at address 0x20001000",
            ),
            ("200_000\n", "2_000_000\n", r"'reserved_bytes' is 2000000, but the region has 1000000 bytes"),
            ('name = "flash"', 'name = "sram"', r"\[\[regions\]\] 2: there are two regions 'sram'"),
            ('name = "flash"', 'name = ""', r"'name' takes a text that is not empty"),
            ('planned = "sram"', 'planed = "sram"', r"\[placement\]: unknown key 'planed'\. Did you mean 'planned'"),
            (
                'planned = "sram"',
                'planned = "sran"',
                r"the region 'sran', which the board does not have\. Did you mean",
            ),
            ('planned = "sram"', 'planned = "flash"', r"'planned' must lie in memory that can be written"),
            ('planned = "sram"', "planned = []", r"'planned' takes a name or a list of names"),
            ("npu_hz = 200_000_000", "npu_hz = 0", r"\[clocks\]: 'npu_hz' takes an integer from 1"),
            ("npu_hz", "npu_mhz", r"\[clocks\]: unknown key 'npu_mhz'\. Did you mean 'npu_hz'"),
            ("bytes_per_cycle = 2.5", "bytes_per_cycle = 0", r"\[costs\]: 'bytes_per_cycle' takes a number above 0"),
            ("bytes_per_cycle = 2.5", "bytes_per_cycle = nan", r"takes a number above 0, not nan"),
            ("bytes_per_cycle = 2.5", "bytes_per_cycle = inf", r"takes a number above 0, not inf"),
            ("bytes_per_cycle = 2.5", f"bytes_per_cycle = {10**400}", r"takes a number above 0, not 1000"),
            ("bytes_per_cycle = 2.5", f"bytes_per_cycle = 0x{'f' * 5000}", r"not an integer of thousands of digits"),
            ("bytes_per_cycle = 2.5", f"bytes_per_cycle = {'9' * 5000}", r"is not valid TOML"),
            ("bytes_per_cycle = 2.5", f"x = {'[' * 9999}", r"is not valid TOML"),
            (
                "operator_cycles = 1000",
                "operator_cycles = -1",
                r"'operator_cycles' takes a number of 0 or more, not -1",
            ),
            (
                "convolution = 1.5",
                "convolutions = 1.5",
                r"\[costs\.compute\]: unknown key 'convolutions'\. Did you mean",
            ),
            ("convolution = 1.5", "convolution = '1'", r"\[costs\.compute\]: 'convolution' takes a number above 0"),
            ("[costs.compute]\nconvolution = 1.5", "compute = 1.5", r"unknown key|'compute' takes a table"),
            ("[clocks]", "[clocks", r"board\.toml' is not valid TOML"),
            ("[clocks]", f"{'a.' * 40_000}b = 1\n[clocks]", r"board\.toml' is not valid TOML: it has 80,\d+ bytes"),
            ('title = "My board"', 'name = "imx95"', r"'name' is 'imx95', the name of a chip"),
            ('title = "My board"', 'name = "a b"', r"'name' takes letters"),
            ("[clocks]\nnpu_hz = 200_000_000", "", r"^$"),
        ],
    )
    def test_wrong_files_are_refused_with_file_and_key(
        self, board_file: Path, old: str, new: str, message: str
    ) -> None:
        assert old in SMALL
        board_file.write_text(SMALL.replace(old, new, 1))
        if message == "^$":
            assert NeutronTargetSpec(board_file).neutron_target.clock_hz is None
            return
        with pytest.raises(TargetError, match=message) as found:
            NeutronTargetSpec(board_file)
        assert str(board_file) in str(found.value)

    def test_the_file_of_the_how_to(self, tmp_path: Path) -> None:
        page = (ROOT / "docs/howto/board-file.md").read_text()
        (tmp_path / "b.toml").write_text(page.split("```toml\n")[1].split("```")[0])
        board = read_board(tmp_path / "b.toml")
        assert (board.name, board.region("sram").free_bytes) == ("gateway_rev_b", 425_984 - 98_304)
        assert board.costs == Costs(compute=(("convolution", 1.2),))
        assert all(kind in page for kind in COMPUTE_KINDS)

    def test_a_file_based_on_itself(self, tmp_path: Path) -> None:
        (tmp_path / "a.toml").write_text('based_on = "b.toml"\n')
        (tmp_path / "b.toml").write_text('based_on = "a.toml"\n')
        with pytest.raises(TargetError, match="based on itself"):
            read_board(tmp_path / "a.toml")

    @pytest.mark.parametrize("name", ["none.toml", "."])
    def test_a_missing_file(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="Cannot read"):
            NeutronTargetSpec(tmp_path / name)

    def test_unknown_names_suggest_boards(self) -> None:
        with pytest.raises(TargetError, match=r"Did you mean 'mimxrt700_evk'.*Known boards: frdm_imx95"):
            NeutronTargetSpec("MIMXRT700-EVK")


def test_kinds_of_computation_equal_the_cost_model() -> None:
    free = {Work.NOTHING, Work.VIEW, Work.PART}
    assert set(COMPUTE_KINDS) == {work.name.lower() for work in Work if work not in free}


@pytest.fixture(scope="module")
def quantized() -> openneutron.QuantizedModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    images = torch.rand(4, 3, 8, 8)
    return openneutron.quantize(net, images[:1], images, recover=None)


class TestTaken:
    """Every place that takes a target takes boards and board files."""

    def test_programs_depend_on_the_chip_only(self, quantized: openneutron.QuantizedModel, board_file: Path) -> None:
        elsewhere = board_file.parent / "other"
        elsewhere.mkdir()
        copy = elsewhere / "renamed.toml"
        copy.write_text(SMALL)
        targets: list[Any] = ["imxrt700", "mimxrt700_evk", str(board_file), copy]
        programs = [openneutron.lower(quantized, target=target) for target in targets]
        assert len({program.buffer for program in programs}) == 1
        assert {program.target for program in programs} == {"imxrt700"}
        labels = [program.estimate().target for program in programs]
        assert labels == ["imxrt700", "mimxrt700_evk", "board", "renamed"]
        assert programs[2].estimate().fit.sram_bytes == 800_000
        assert programs[2].estimate("mcxn94x").target == "mcxn94x"
        assert pickle.loads(pickle.dumps(programs[2])).board == programs[2].board

    def test_quantize_gives_the_board_to_lower(self, board_file: Path) -> None:
        images = torch.rand(2, 3, 8, 8)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
        model = openneutron.quantize(net, images[:1], images, str(board_file), recover=None)
        assert model.target == "imxrt700"
        program = openneutron.lower(model)
        assert program.estimate().target == "board"
        assert summarize("net", program, quantized=model).target.board == "board"
        model.save(board_file.with_name("model.pt2"))
        assert openneutron.lower(board_file.with_name("model.pt2")).board is None

    @pytest.mark.parametrize(
        ("target", "board"),
        [("mimxrt700_evk", "mimxrt700_evk"), ("imxrt700", None), ("other/mimxrt700_evk.toml", None)],
    )
    def test_a_file_of_a_quantized_model_keeps_the_name_of_a_board(
        self, quantized: openneutron.QuantizedModel, target: str, board: str | None, tmp_path: Path
    ) -> None:
        """A board file of the same name as a known board is not that board."""
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "mimxrt700_evk.toml").write_text(SMALL)
        chosen = NeutronTargetSpec(tmp_path / target if target.endswith(".toml") else target)
        replace(quantized, board=chosen).save(tmp_path / "model.pt2")
        program = openneutron.lower(tmp_path / "model.pt2")
        found = None if program.board is None or program.board.board is None else program.board.board.name
        assert (program.target, found) == ("imxrt700", board)
        assert program.buffer == openneutron.lower(quantized).buffer

    def test_costs_change_estimates(self, quantized: openneutron.QuantizedModel, board_file: Path) -> None:
        program = openneutron.lower(quantized)
        chip, board = program.estimate(), program.estimate(board_file)
        layer, same = chip.layers[-1], board.layers[-1]
        assert layer.operator == same.operator == "FULLY_CONNECTED"
        moved = 8 * 36 + 4 + 8 * 36 * 4 + 4 * 4  # input, output, weights, bias
        assert layer.cycles - same.cycles == 4450 - 1000 + -(-moved // 8) - int(-(-moved // 2.5))
        convolution = next(one for one in board.layers if one.operator == "CONV_2D")
        assert convolution.cycles > 1000 + 1.5 * 36 * 9
        assert board.milliseconds == 1000 * board.cycles / 200_000_000
        assert chip.milliseconds is None

    def test_the_documented_flow(self, board_file: Path) -> None:
        spec = generate_neutron_compile_spec(str(board_file))
        assert spec == generate_neutron_compile_spec("imxrt700")
        assert CompileOptions(str(board_file)).target == "imxrt700"
        partitioner = NeutronPartitioner(spec, target=board_file)
        assert partitioner.options.target == "imxrt700"
        assert NeutronPartitioner(spec, NeutronTargetSpec("mimxrt700_evk")).options.target == "imxrt700"
        assert NeutronQuantizer(board_file).target == NeutronTargetSpec("imxrt700")

    def test_other_functions(self, quantized: openneutron.QuantizedModel, board_file: Path, tmp_path: Path) -> None:
        path = tmp_path / "model.pte"
        openneutron.lower(quantized).save(path)
        report = openneutron.inspect(path, board_file)
        assert report.estimate.target == "board"
        assert "memory on board" in str(report)
        assert supported_operators("conv2d", target=board_file) == supported_operators("conv2d", target="imxrt700")
        summary = summarize("net", path, target=board_file)
        assert (summary.target.name, summary.target.board, summary.target.sram_bytes) == ("imxrt700", "board", 800_000)

    @pytest.mark.usefixtures("board_file")
    def test_settings_keep_the_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        settings = Settings.of({"target": "board.toml"})
        check_settings(settings, uses=())
        (tmp_path / "out").mkdir()
        write_settings("out/openneutron.toml", settings)
        assert 'target = "../board.toml"' in Path("out/openneutron.toml").read_text()
        assert read_settings("out/openneutron.toml") == settings
        write_settings("out/named.toml", Settings.of({"target": "mimxrt700_evk"}))
        assert read_settings("out/named.toml").build.target == "mimxrt700_evk"
        with pytest.raises(InputError, match=r"target: 'bord.toml' does not exist.* Did you mean 'board.toml'"):
            Settings.of({"target": "bord.toml"}).check_paths()

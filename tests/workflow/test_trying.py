"""Changes that may make a program fit on a board, tried by lowering again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import openneutron
from openneutron.errors import ModelError
from openneutron.report.board_parts import CHANNELS_LAST, INT8
from openneutron.report.regions import FETCH, BoardFit, Remedy
from openneutron.targets import Board, NeutronTargetSpec, Region, boards
from openneutron.workflow import trying
from openneutron.workflow.trying import try_changes


def board(sram: int, flash: int = 1 << 20) -> NeutronTargetSpec:
    regions = (Region("sram", "SRAM", sram, npu_reads=True), Region("flash", "flash", flash, npu_reads=False))
    return NeutronTargetSpec(Board("small", boards()["frdm_mcxn947"].chip, regions=regions))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(16, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()


IMAGES = torch.rand(2, 16, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def quantized() -> openneutron.QuantizedModel:
    return openneutron.quantize(net(), IMAGES[:1], IMAGES, target="frdm_mcxn947", recover=None)


@pytest.fixture(scope="module")
def program(quantized: openneutron.QuantizedModel) -> openneutron.NeutronProgram:
    return openneutron.lower(quantized)


@pytest.fixture(scope="module")
def small(program: openneutron.NeutronProgram) -> NeutronTargetSpec:
    """A board on which one byte is missing."""
    return board(needed(program, board(1 << 20)) - 1)


def needed(program: openneutron.NeutronProgram, target: NeutronTargetSpec) -> int:
    found = program.estimate(target).on_board
    assert found is not None
    return found.ram_bytes


def remedies(found: BoardFit | None) -> dict[str, Remedy]:
    assert found is not None
    return {one.change: one for one in found.remedies}


def test_tried_numbers_are_those_of_the_changed_programs(
    quantized: openneutron.QuantizedModel, program: openneutron.NeutronProgram, small: NeutronTargetSpec
) -> None:
    found = remedies(try_changes(quantized, replace(program, board=small), {}))
    together = f"{INT8}, {CHANNELS_LAST}, {FETCH}"
    nhwc = quantized.example_inputs[0].contiguous(memory_format=torch.channels_last)
    in_nhwc = replace(quantized, example_inputs=(nhwc,))
    programs = {
        INT8: openneutron.lower(quantized, int8_io=True),
        CHANNELS_LAST: openneutron.lower(in_nhwc),
        FETCH: openneutron.lower(quantized, fetch_constants_to_sram=True),
        together: openneutron.lower(in_nhwc, int8_io=True, fetch_constants_to_sram=True),
    }
    assert {change for change, one in found.items() if one.how == "tried"} == set(programs)
    for change, changed in programs.items():
        assert found[change].ram_bytes == needed(changed, small)
        assert found[change].fits
    assert all(one.how == "computed" for change, one in found.items() if change.startswith("half"))
    assert found.keys() == remedies(program.estimate(small).on_board).keys()


def test_a_tried_change_is_unknown_in_a_region_of_unknown_size(
    quantized: openneutron.QuantizedModel, program: openneutron.NeutronProgram, small: NeutronTargetSpec
) -> None:
    assert small.board is not None
    sram, flash = small.board.regions
    unknown = NeutronTargetSpec(replace(small.board, regions=(sram, replace(flash, bytes=None))))
    verdict = try_changes(quantized, replace(program, board=unknown), {})
    found = remedies(verdict)
    assert (found[FETCH].fits, found[FETCH].how) == (None, "tried")
    assert found[INT8].fits
    assert verdict is not None
    assert verdict.verdict == "does not fit"


def test_options_of_the_program_are_kept(quantized: openneutron.QuantizedModel) -> None:
    options = {"int8_io": True}
    tiny = board(1000, flash=1000)
    changed = openneutron.lower(quantized, target=tiny, **options)
    found = remedies(try_changes(quantized, changed, options))
    both = openneutron.lower(quantized, int8_io=True, fetch_constants_to_sram=True)
    assert INT8 not in found
    assert found[FETCH].ram_bytes == needed(both, tiny)
    assert not found[FETCH].fits


def test_channels_last_is_tried_where_its_saving_is_unknown() -> None:
    model = nn.Sequential(nn.Conv2d(16, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    images = torch.rand(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"operators_not_to_delegate": ["aten.linear.default"]}
    quantized = openneutron.quantize(model, images, images, recover=None)
    program = openneutron.lower(quantized, target=board(1000, flash=1000), **options)
    assert CHANNELS_LAST not in remedies(program.estimate().on_board)
    found = try_changes(quantized, program, options)
    assert found is not None
    assert remedies(found)[CHANNELS_LAST].how == "tried"
    assert remedies(found)[CHANNELS_LAST].ram_bytes < found.ram_bytes


def test_channels_last_is_not_tried_without_nchw_images(quantized: openneutron.QuantizedModel) -> None:
    nhwc = quantized.example_inputs[0].contiguous(memory_format=torch.channels_last)
    in_nhwc = replace(quantized, example_inputs=(nhwc,))
    found = try_changes(in_nhwc, openneutron.lower(in_nhwc, target=board(1000, flash=1000)), {})
    assert not any(CHANNELS_LAST in change for change in remedies(found))


def test_a_program_that_fits_is_not_lowered_again(
    quantized: openneutron.QuantizedModel, program: openneutron.NeutronProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trying, "lower", None)
    assert try_changes(quantized, program, {}) == program.estimate().on_board
    assert try_changes(quantized, replace(program, board=None), {}) is None


def test_a_change_that_cannot_be_lowered_stays_computed(
    quantized: openneutron.QuantizedModel,
    program: openneutron.NeutronProgram,
    small: NeutronTargetSpec,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ModelError("No such layout.\nMore.")

    monkeypatch.setattr(trying, "lower", fails)
    found = try_changes(quantized, replace(program, board=small), {})
    assert found is not None
    assert {one.how for one in found.remedies} == {"computed"}
    assert f"The change {INT8} was not tried, because lowering failed: No such layout." in found.notes


def test_a_build_tries_changes(small: NeutronTargetSpec) -> None:
    built = openneutron.build(net(), IMAGES[:1], IMAGES, target=small, analyze=False, recover=None)
    memory = built.summary.memory
    assert remedies(memory.on_board)[INT8].how == "tried"
    assert memory.verdict == "fits with fetch_constants_to_sram"
    assert memory.needed_bytes == remedies(memory.on_board)[FETCH].ram_bytes

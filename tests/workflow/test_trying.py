"""Changes that may make a program fit on a board, tried by lowering again."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import openneutron
from openneutron.errors import ModelError, OptionError
from openneutron.report.board_parts import CHANNELS_LAST, INT8
from openneutron.report.regions import FETCH, BoardFit, Remedy
from openneutron.targets import Board, NeutronTargetSpec, Region, boards
from openneutron.workflow import trying
from openneutron.workflow.smaller_images import NOT_MEASURED, quantized_for_smaller_images, smaller_examples
from openneutron.workflow.trying import report_with_changes, try_changes


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


def test_tried_numbers_equal_the_changed_programs(
    quantized: openneutron.QuantizedModel, program: openneutron.NeutronProgram, small: NeutronTargetSpec
) -> None:
    found = remedies(try_changes(replace(program, board=small), quantized))
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
    verdict = try_changes(replace(program, board=unknown), quantized)
    found = remedies(verdict)
    assert (found[FETCH].fits, found[FETCH].how) == (None, "tried")
    assert found[INT8].fits
    assert verdict is not None
    assert verdict.verdict == "does not fit"


def test_options_of_the_program_are_kept(quantized: openneutron.QuantizedModel) -> None:
    options = {"int8_io": True}
    tiny = board(1000, flash=1000)
    changed = openneutron.lower(quantized, target=tiny, **options)
    found = remedies(try_changes(changed, quantized))
    both = openneutron.lower(quantized, int8_io=True, fetch_constants_to_sram=True)
    assert INT8 not in found
    assert found[FETCH].ram_bytes == needed(both, tiny)
    assert not found[FETCH].fits


def test_channels_last_is_tried_if_its_saving_is_unknown() -> None:
    model = nn.Sequential(nn.Conv2d(16, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    images = torch.rand(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"operators_not_to_delegate": ["aten.linear.default"]}
    quantized = openneutron.quantize(model, images, images, recover=None)
    program = openneutron.lower(quantized, target=board(1000, flash=1000), **options)
    assert CHANNELS_LAST not in remedies(program.estimate().on_board)
    found = try_changes(program, quantized)
    assert found is not None
    assert remedies(found)[CHANNELS_LAST].how == "tried"
    assert remedies(found)[CHANNELS_LAST].ram_bytes < found.ram_bytes


def test_channels_last_is_not_tried_without_nchw_images(quantized: openneutron.QuantizedModel) -> None:
    nhwc = quantized.example_inputs[0].contiguous(memory_format=torch.channels_last)
    in_nhwc = replace(quantized, example_inputs=(nhwc,))
    found = try_changes(openneutron.lower(in_nhwc, target=board(1000, flash=1000)), in_nhwc)
    assert not any(CHANNELS_LAST in change for change in remedies(found))


def test_a_program_that_fits_is_not_lowered_again(
    quantized: openneutron.QuantizedModel, program: openneutron.NeutronProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trying, "lower", None)
    roomy = board(1 << 20)
    assert try_changes(program, quantized, roomy) == program.estimate(roomy).on_board


def test_a_change_that_cannot_be_lowered_stays_computed(
    quantized: openneutron.QuantizedModel,
    program: openneutron.NeutronProgram,
    small: NeutronTargetSpec,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ModelError("No such layout.\nMore.")

    monkeypatch.setattr(trying, "lower", fails)
    found = try_changes(replace(program, board=small), quantized)
    assert found is not None
    assert {one.how for one in found.remedies} == {"computed"}
    assert f"The change {INT8} has no result, because lowering failed: No such layout." in found.notes


def test_a_build_tries_changes(small: NeutronTargetSpec) -> None:
    built = openneutron.build(net(), IMAGES[:1], IMAGES, target=small, analyze=False, recover=None)
    memory = built.summary.memory
    assert remedies(memory.on_board)[INT8].how == "tried"
    assert remedies(memory.on_board)["input of 1x16x16x16"].how == "tried"
    assert memory.verdict == "fits with fetch_constants_to_sram"
    assert memory.needed_bytes == remedies(memory.on_board)[FETCH].ram_bytes


def test_smaller_images_are_tried_with_the_float_model(
    quantized: openneutron.QuantizedModel, program: openneutron.NeutronProgram
) -> None:
    tiny = board(5000, flash=1000)
    verdict = try_changes(program, quantized, tiny, model=net(), example_inputs=IMAGES[:1])
    found = remedies(verdict)
    for side in (24, 16):
        images = IMAGES[:, :, :side, :side]
        smaller = openneutron.lower(openneutron.quantize(net(), images[:1], images, target=tiny, recover=None))
        change = f"input of 1x16x{side}x{side}"
        assert (found[change].ram_bytes, found[change].how) == (needed(smaller, tiny), "tried")
        combined = next(one for name, one in found.items() if name.endswith(f", {change}"))
        assert INT8 in combined.change
        assert combined.ram_bytes < found[change].ram_bytes
    assert NOT_MEASURED in verdict.notes


def test_no_combination_is_tried_if_a_smaller_image_fits(
    quantized: openneutron.QuantizedModel, program: openneutron.NeutronProgram, small: NeutronTargetSpec
) -> None:
    found = remedies(try_changes(program, quantized, small, model=net()))
    assert {name for name in found if "input of" in name} == {"input of 1x16x24x24", "input of 1x16x16x16"}
    assert all(found[f"input of 1x16x{side}x{side}"].fits for side in (24, 16))


def test_images_that_the_model_does_not_take_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 32 * 32, 2)).eval()
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    quantized = openneutron.quantize(model, images, images, recover=None)
    verdict = try_changes(openneutron.lower(quantized), quantized, board(1000, flash=1000), model=model)
    assert not any("input of" in name for name in remedies(verdict))
    assert NOT_MEASURED not in verdict.notes
    reasons = [note for note in verdict.notes if note.startswith("The change input of 1x3x")]
    assert len(reasons) == 2
    assert "the model fails" in reasons[0]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 3, 224, 320), "input of 1x3x168x240"),
        ((1, 96, 128, 3), "input of 1x72x96x3"),  # NHWC
        ((1, 1, 49, 10), None),  # a spectrogram
        ((1, 224, 224), None),
        ((2, 8, 16, 16), "input of 2x8x12x12"),
    ],
)
def test_smaller_examples(shape: tuple[int, ...], expected: str | None) -> None:
    found = smaller_examples({"image": np.zeros(shape, np.float32), "other": 3}, Fraction(3, 4))
    assert (found and found[0]) == expected
    assert found is None or (found[1]["other"] == 3 and isinstance(found[1]["image"], torch.Tensor))


def test_smaller_examples_keep_the_memory_format_and_all_images() -> None:
    image = torch.zeros(1, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    found = smaller_examples((image, torch.zeros(1, 1, 32, 32), torch.zeros(1, 5)), Fraction(1, 2), 32)
    assert found is None  # 16 is not a multiple of 32
    found = smaller_examples((image, torch.zeros(1, 1, 64, 64), torch.zeros(1, 5)), Fraction(1, 2), 32)
    assert found is not None
    assert found[0] == "inputs of 1x3x32x32, 1x1x32x32"
    assert found[1][0].is_contiguous(memory_format=torch.channels_last)
    assert found[1][2].shape == (1, 5)


def test_a_network_that_needs_multiples_of_32() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv2d(3, 3, 32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.interpolate(self.down(x), scale_factor=32.0) + x

    image = torch.rand(1, 3, 64, 64)
    found, notes = quantized_for_smaller_images(Skip().eval(), (image,), "imxrt700", {})
    assert [one.change for one in found] == ["input of 1x3x32x32"]
    assert not notes


def test_wrong_uses_are_typed(
    quantized: openneutron.QuantizedModel, program: openneutron.NeutronProgram, tmp_path: Path
) -> None:
    other = replace(quantized, example_inputs=(IMAGES[:1, :, :16],))
    with pytest.raises(ModelError, match="was not lowered from this quantized model"):
        try_changes(program, other, board(1000))
    with pytest.raises(OptionError, match="Changes are tried for a board"):
        try_changes(program, quantized, "imxrt700")
    with pytest.raises(OptionError, match="--quantized"):
        report_with_changes(tmp_path / "model.pte", None)
    with pytest.raises(ModelError, match="A quantized model"):
        try_changes(program, net(), board(1000))  # type: ignore[arg-type]


def test_files_are_tried_as_their_objects(
    quantized: openneutron.QuantizedModel, program: openneutron.NeutronProgram, tmp_path: Path
) -> None:
    program.save(tmp_path / "model.pte")
    quantized.save(tmp_path / "quantized.pt2")
    tiny = board(5000, flash=1000)
    assert try_changes(tmp_path / "model.pte", tmp_path / "quantized.pt2", tiny) == try_changes(
        program, quantized, tiny
    )


def test_a_build_without_try_changes_tries_none(small: NeutronTargetSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trying, "lower", None)
    built = openneutron.build(net(), IMAGES[:1], IMAGES, target=small, analyze=False, recover=None, try_changes=False)
    assert {one.how for one in remedies(built.summary.memory.on_board).values()} == {"computed"}

"""Accuracy after quantization-aware training on digits, and the script of docs/howto/training-torchao.md."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
from examples.digits.network import DigitsSplit, load_digits_split, load_network
from examples.digits.qat import accuracy, calibrate, train_quantized
from tests.flow_support import lower_documented


class TestDigits:
    """The network of the demo, trained for two epochs."""

    @pytest.fixture(scope="class")
    def data(self) -> DigitsSplit:
        return load_digits_split()

    @pytest.mark.slow
    def test_eight_bits_are_as_good_as_float(self, data: DigitsSplit) -> None:
        converted = train_quantized(data)
        tests = data.test_images, data.test_labels
        # Over five seeds, it is within 0.2 % (one image) of float.
        assert accuracy(converted, *tests) >= accuracy(load_network(), *tests) - 0.01
        program = lower_documented(converted, (data.test_images[:1],))
        assert (program.delegates, program.cpu) == (1, [])
        assert abs(accuracy(program.run, *tests) - accuracy(converted, *tests)) <= 0.002

    @pytest.mark.slow
    # Calibration loses almost nothing at 4 bits. The result of two epochs differs by a few of the 500 images between
    # processors.
    @pytest.mark.parametrize(("bits", "floor", "gain"), [(4, 0.99, -0.01), (3, 0.95, 0.002)])
    def test_training_recovers_the_loss_of_calibration(
        self, data: DigitsSplit, bits: int, floor: float, gain: float
    ) -> None:
        tests = data.test_images, data.test_labels
        trained_accuracy = accuracy(train_quantized(data, bits), *tests)
        assert trained_accuracy >= accuracy(calibrate(data, bits), *tests) + gain
        assert trained_accuracy >= floor

    @pytest.mark.slow
    def test_script_of_the_documents(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        page = Path(__file__).parents[2] / "docs" / "howto" / "training-torchao.md"
        (script,) = re.findall(
            r"<!-- run by tests/quantizer/test_qat_digits.py -->\n((?: {4}.*\n|\n)+)", page.read_text()
        )
        monkeypatch.chdir(tmp_path)
        names: dict[str, Any] = {}
        exec(compile(textwrap.dedent(script), str(page), "exec"), names)
        assert {row.where for row in names["program"].placement} == {"npu"}
        assert (tmp_path / "digits.pte").read_bytes() == names["program"].buffer

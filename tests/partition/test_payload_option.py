"""`payload`: the same script returns a device program if a converter is installed, else a portable one."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from executorch.exir import to_edge_transform_and_lower
from tests.flow_support import names_of_inputs, worst_lsb
from tests.vendor.test_sdk import DOUBLES
from torch import nn

from openneutron import (
    CompileOptions,
    NeutronPartitioner,
    NeutronProgram,
    QuantizedModel,
    generate_neutron_compile_spec,
    lower,
    quantize,
)
from openneutron.errors import ConverterError, OptionError
from openneutron.formats import pte, tflite
from openneutron.formats.payload import parse
from openneutron.vendor.sdk import ConverterWarning


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(4, 8, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = torch.sigmoid(self.first(x)), self.second(y)
        return a + b, b


@pytest.fixture(scope="module")
def quantized() -> QuantizedModel:
    torch.manual_seed(0)
    samples = [(torch.randn(1, 3, 8, 8), torch.randn(1, 4, 8, 8))]
    return quantize(TwoInputs().eval(), samples[0], samples)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOUBLES))
    monkeypatch.delenv("NEUTRON_DOUBLE", raising=False)
    monkeypatch.setenv("OPENNEUTRON_CACHE", "")


@pytest.fixture
def only_a_flavor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "packages").mkdir()
    os.symlink(DOUBLES / "neutron_converter_SDK_25_06", tmp_path / "packages" / "neutron_converter_SDK_25_06")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))


def documented(quantized: QuantizedModel, **options: Any) -> bytes:
    exported = torch.export.export(quantized.module, quantized.example_inputs)
    partitioner = [NeutronPartitioner(generate_neutron_compile_spec("imxrt700", **options))]
    methods = names_of_inputs(exported)
    edge = to_edge_transform_and_lower(exported, partitioner=partitioner, constant_methods=methods)
    return bytes(edge.to_executorch().buffer)


def payloads(data: bytes) -> list[bool]:
    """Returns, for each delegate, whether it is portable."""
    return [parse(one.payload).is_portable for method in pte.read(data).methods for one in method.delegates]


class TestAuto:
    def test_without_a_converter_the_program_is_portable(self, quantized: QuantizedModel) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConverterWarning)
            program = lower(quantized)
        assert not program.is_device
        assert program.buffer == program.portable == documented(quantized)

    @pytest.mark.usefixtures("installed")
    def test_with_a_converter_the_program_is_for_the_device(self, quantized: QuantizedModel) -> None:
        program = lower(quantized)
        assert program.is_device
        assert payloads(program.buffer) == [False]
        assert program.buffer == documented(quantized) == documented(quantized, payload="device")

    @pytest.mark.usefixtures("installed")
    def test_the_host_runs_the_portable_form(self, quantized: QuantizedModel) -> None:
        program = lower(quantized)
        assert program.portable == lower(quantized, payload="portable").buffer
        assert worst_lsb(quantized.module, program.run, [quantized.example_inputs]) <= 1
        assert [info.shape for info in program.inputs] == [(1, 3, 8, 8), (1, 4, 8, 8)]
        assert [info.shape for info in program.outputs] == [(1, 8, 8, 8)] * 2

    @pytest.mark.usefixtures("only_a_flavor")
    def test_with_another_converter_the_program_is_portable_with_a_warning(self, quantized: QuantizedModel) -> None:
        with pytest.warns(ConverterWarning, match=r"stay portable.*installed: neutron_converter_SDK_25_06"):
            program = lower(quantized)
        assert payloads(program.buffer) == [True]


class TestAsked:
    @pytest.mark.usefixtures("installed")
    def test_payload_portable_gives_a_portable_program(self, quantized: QuantizedModel) -> None:
        assert payloads(lower(quantized, payload="portable").buffer) == [True]
        assert payloads(documented(quantized, payload="portable")) == [True]

    @pytest.mark.parametrize("flow", [lower, documented])
    def test_a_device_payload_without_a_converter_says_what_to_do(self, flow: Any, quantized: QuantizedModel) -> None:
        with pytest.raises(ConverterError, match=r"installed: none.*openneutron compile"):
            flow(quantized, payload="device")

    @pytest.mark.usefixtures("only_a_flavor")
    def test_without_a_flavour_other_converters_are_not_taken(self, quantized: QuantizedModel) -> None:
        with pytest.raises(
            ConverterError, match=r"named eiq_neutron_sdk, which runs without a flavour \(installed: neutron_converter"
        ):
            lower(quantized, payload="device")

    @pytest.mark.parametrize("value", ["both", "", None, True])
    def test_other_values_are_refused(self, value: Any) -> None:
        with pytest.raises(OptionError, match="payload is one of auto, portable, device"):
            CompileOptions(payload=value)

    def test_the_payload_option_reaches_the_partitioner_and_is_not_stored(self, quantized: QuantizedModel) -> None:
        specs = generate_neutron_compile_spec("imxrt700", payload="portable")
        assert CompileOptions.from_specs(specs).payload == "portable"
        (delegate,) = pte.read(documented(quantized, payload="portable")).methods[0].delegates
        assert "payload" not in delegate.compile_specs


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("words", ["reversed", "version1:reversed"])
def test_a_converter_that_reorders_is_followed(
    words: str, quantized: QuantizedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEUTRON_DOUBLE", words)
    program = lower(quantized)
    assert program.buffer == documented(quantized)
    (before,), (after,) = (
        [parse(one.payload).header for one in pte.read(data).methods[0].delegates]
        for data in (program.portable, program.buffer)
    )
    assert after.input_map == before.input_map[::-1]
    assert after.output_map == before.output_map[::-1]


@pytest.fixture(scope="module")
def in_two(quantized: QuantizedModel) -> dict[str, Any]:
    return {"quantized": quantized, "options": {"operators_not_to_delegate": ["sigmoid"]}}


@pytest.mark.usefixtures("installed")
class TestFiles:
    @pytest.mark.parametrize("flow", ["lower", "documented"])
    def test_intermediates_of_both_stages_are_written(self, flow: str, in_two: dict[str, Any], tmp_path: Path) -> None:
        options = {**in_two["options"], "intermediates_dir": str(tmp_path)}
        if flow == "lower":
            lower(in_two["quantized"], **options)
        else:
            with pytest.warns(UserWarning, match="run on the CPU"):
                documented(in_two["quantized"], **options)
        found = {path.name: tflite.read(path.read_bytes()).subgraphs[0].operators for path in tmp_path.glob("*.tflite")}
        assert sorted(found) == [
            "partition_0.tflite", "partition_0_neutron.tflite", "partition_1.tflite", "partition_1_neutron.tflite",
        ]  # fmt: skip
        for name, operators in found.items():
            assert ([one.name for one in operators] == ["NeutronGraph"]) == name.endswith("_neutron.tflite")

    def test_kernel_selections_are_one_file_beside_the_program(self, in_two: dict[str, Any], tmp_path: Path) -> None:
        program = lower(in_two["quantized"], dump_kernel_selection_code=True, **in_two["options"])
        program.save(tmp_path / "model.pte")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pte", "model_kernel_selection.c"]
        sizes = [len(model) for model in tflites(program)]
        lines = (tmp_path / "model_kernel_selection.c").read_text().splitlines()
        assert lines == [f"// kernels of {size} bytes" for size in sizes]

    @pytest.mark.filterwarnings("ignore:These operators run on the CPU")
    def test_the_documented_flow_writes_kernel_selections_to_intermediates_dir(
        self, in_two: dict[str, Any], tmp_path: Path
    ) -> None:
        documented(
            in_two["quantized"], dump_kernel_selection_code=True, intermediates_dir=str(tmp_path), **in_two["options"]
        )
        assert len((tmp_path / NeutronPartitioner.KERNEL_SELECTION).read_text().splitlines()) == 2

    def test_a_package_that_cannot_merge_is_an_error(self, in_two: dict[str, Any]) -> None:
        options = {**in_two["options"], "neutron_converter_flavor": "SDK_25_06", "dump_kernel_selection_code": True}
        with pytest.raises(ConverterError, match="has no merge_kernel_selection_files"):
            lower(in_two["quantized"], **options)


def tflites(program: NeutronProgram) -> list[bytes]:
    return [parse(one.payload).tflite for one in pte.read(program.portable).methods[0].delegates]

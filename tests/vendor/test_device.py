"""Device payloads equal those of ExecuTorch's own code byte by byte, also for `.pte` files compiled later."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.vendor.test_sdk import DOUBLES
from torch import nn

from openneutron import lower, quantize
from openneutron.compile_spec import CompileOptions
from openneutron.errors import ConverterError, HostError, ModelError, OptionError
from openneutron.formats import pte, tflite
from openneutron.formats.payload import PayloadHeader, parse
from openneutron.ir.graph import Graph, Op, QParams, Tensor
from openneutron.ir.kinds import RELU
from openneutron.neutron_program import NeutronProgram
from openneutron.runtime import HostProgram
from openneutron.vendor import sdk
from openneutron.vendor.device import compile_program, converter_flags, device_payload

LIMIT = 60.0


@pytest.fixture(autouse=True)
def _doubles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(DOUBLES))
    monkeypatch.delenv("NEUTRON_DOUBLE", raising=False)
    monkeypatch.setenv("OPENNEUTRON_CACHE", str(tmp_path / "cache"))


def converted(inputs: int, outputs: int) -> bytes:
    """Returns the conversion of a graph with this many inputs and outputs by the double."""
    qparams = QParams.per_tensor(0.1, 0)
    sources, results, ops = [], [], []
    for number in range(max(inputs, outputs)):
        if number < inputs:
            sources.append(Tensor((1, 4, 4, 8 + number), np.dtype(np.int8), qparams))
        if number < outputs:
            source = sources[min(number, len(sources) - 1)]
            results.append(Tensor(source.shape, source.dtype, qparams))
            ops.append(Op(RELU, (source,), results[-1], {}, "relu"))
    model = tflite.write(Graph(tuple(sources), tuple(results), tuple(ops)))
    return sdk.convert(sdk.Conversion(model, "imxrt700", sdk.DEFAULT_FLAGS), sdk.choose_converter(None)).tflite


@dataclass(frozen=True)
class Formats:
    """A form of converted models: options of the double, and the formats of the graph's inputs and outputs."""

    words: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


SHAPES = (
    Formats("", (0,), (0,)),
    Formats("", (1,), (1,)),
    Formats("reversed", (0, 1, 0), (1, 0)),
    Formats("version1", (1, 0), (0,)),
    Formats("version1:reversed", (1, 0), (0, 1, 1)),
)


@pytest.mark.slow
def test_payloads_equal_executorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, requests = [], []
    for number, shape in enumerate(SHAPES):
        monkeypatch.setenv("NEUTRON_DOUBLE", shape.words)
        inputs, outputs = len(shape.inputs), len(shape.outputs)
        model = converted(inputs, outputs)
        header = PayloadHeader(shape.inputs, shape.outputs, tuple(range(inputs)), tuple(range(outputs)), inputs)
        ours.append(device_payload(header, model))
        paths = {name: str(tmp_path / f"{name}{number}") for name in ("model", "result")}
        Path(paths["model"]).write_bytes(model)
        requests.append({**paths, "inputs": shape.inputs, "outputs": shape.outputs})
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    script = Path(__file__).parents[1] / "payload_oracle.py"
    environment = {**os.environ, "PYTHONPATH": ""}
    subprocess.run([sys.executable, str(script), str(tmp_path / "requests.json")], check=True, env=environment)
    assert ours == [Path(str(request["result"])).read_bytes() for request in requests]
    assert [parse(payload).header.version for payload in ours] == [0, 0, 0, 1, 1]


def test_the_error_names_operators_outside_of_the_neutron_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUTRON_DOUBLE", "outside")
    with pytest.raises(
        ConverterError, match=r"did not convert all of the model.*left SOFTMAX.*operators_not_to_delegate"
    ):
        device_payload(PayloadHeader((0,), (0,), (0,), (0,), 1), converted(1, 1))


class TestFlags:
    def test_options_reach_the_converter(self) -> None:
        options = CompileOptions(
            fetch_constants_to_sram=True, dump_kernel_selection_code=True, use_profiling=True,
            extra_flags="minNumOpsPerGraph=3 --name=a,b verbose=False",
        )  # fmt: skip
        flags = converter_flags(options)
        assert flags["fetchConstantsToSRAM"] is True
        assert flags["dumpKernelSelectionCode"] is True
        assert flags["useProfiling"] is True
        assert (flags["minNumOpsPerGraph"], flags["name"], flags["verbose"]) == (3, "a,b", False)

    @pytest.mark.parametrize("text", ["fast", "3=4", "="])
    def test_other_text_is_refused(self, text: str) -> None:
        with pytest.raises(OptionError, match="extra_flags takes 'name=value'"):
            converter_flags(CompileOptions(extra_flags=text))


@pytest.fixture(scope="module")
def programs() -> dict[str, NeutronProgram]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Sigmoid(), nn.Conv2d(8, 4, 1)).eval()
    samples = [(torch.randn(1, 3, 8, 8),) for _ in range(2)]
    quantized = quantize(model, samples[0], samples)
    return {
        "one": lower(quantized),
        "two": lower(quantized, operators_not_to_delegate=["sigmoid"]),
        "none": lower(quantized, operators_not_to_delegate=["conv2d", "sigmoid", "conv2d_1"]),
    }


def delegates(data: bytes) -> list[bytes]:
    return [bytes(delegate.payload) for method in pte.read(data).methods for delegate in method.delegates]


class TestCompile:
    @pytest.mark.parametrize("name", ["one", "two"])
    def test_turns_each_portable_payload_into_a_device_payload(
        self, name: str, programs: dict[str, NeutronProgram]
    ) -> None:
        data = programs[name].buffer
        device = compile_program(data, sdk.choose_converter(None), time_limit=LIMIT).program
        before, after = (list(map(parse, delegates(one))) for one in (data, device))
        assert [payload.is_portable for payload in before] == [True] * len(before)
        assert [payload.is_portable for payload in after] == [False] * len(before)
        assert [payload.header for payload in after] == [payload.header for payload in before]

    @pytest.mark.parametrize("name", ["one", "two"])
    def test_all_else_stays_byte_for_byte(self, name: str, programs: dict[str, NeutronProgram]) -> None:
        data = programs[name].buffer
        device = compile_program(data, sdk.choose_converter(None), time_limit=LIMIT).program
        segments = [one.segment for method in pte.read(data).methods for one in method.delegates]
        back = dict(zip(segments, delegates(data), strict=True))
        assert pte.replace_payloads(device, {number: back[number] for number in segments if number is not None}) == data

    def test_the_host_refuses_compiled_programs(self, programs: dict[str, NeutronProgram]) -> None:
        device = compile_program(programs["one"].buffer, sdk.choose_converter(None), time_limit=LIMIT).program
        with pytest.raises(HostError, match="microcode"):
            HostProgram.from_bytes(device)

    def test_compiled_programs_are_refused(self, programs: dict[str, NeutronProgram]) -> None:
        device = compile_program(programs["one"].buffer, sdk.choose_converter(None), time_limit=LIMIT).program
        with pytest.raises(ModelError, match="is compiled already"):
            compile_program(device, sdk.choose_converter(None), time_limit=LIMIT)

    def test_programs_without_our_delegates_are_refused(self, programs: dict[str, NeutronProgram]) -> None:
        with pytest.raises(ModelError, match="has no delegate of NeutronBackend"):
            compile_program(programs["none"].buffer, sdk.choose_converter(None), time_limit=LIMIT)

    def test_another_target_is_refused(self, programs: dict[str, NeutronProgram]) -> None:
        with pytest.raises(OptionError, match="was lowered for imxrt700"):
            compile_program(programs["one"].buffer, sdk.choose_converter(None), target="imx95", time_limit=LIMIT)

    @pytest.mark.parametrize("cut", [slice(0, 0), slice(0, 100), slice(0, -8)])
    def test_a_broken_file_is_refused(self, cut: slice, programs: dict[str, NeutronProgram]) -> None:
        with pytest.raises(ValueError, match="byte"):
            compile_program(programs["one"].buffer[cut], sdk.choose_converter(None), time_limit=LIMIT)

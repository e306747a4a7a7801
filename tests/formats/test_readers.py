"""The readers of TFLite and `.pte` files: their results for valid files, and errors for damaged ones."""

from __future__ import annotations

import contextlib
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from executorch.exir._serialize._program import deserialize_pte_binary
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from openneutron import lower, quantize
from openneutron.errors import FormatError, OptionError, PayloadError, TargetError
from openneutron.formats import pte, tflite
from openneutron.formats.payload import pack_portable, parse
from openneutron.report.inspect import inspect_bytes
from openneutron.vendor.profiling import kernels_of

SLOWEST_SECONDS = 2.0
MOST_BYTES = 4_000_000  # for files of a few kilobytes


def _program() -> bytes:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Sigmoid(), nn.Conv2d(8, 4, 1), nn.ReLU()).eval()
    samples = [(torch.randn(1, 3, 8, 8),)]
    return lower(quantize(model, samples[0], samples), operators_not_to_delegate=["sigmoid"]).buffer


PROGRAM = _program()
MODEL = parse(pte.read(PROGRAM).methods[0].delegates[0].payload).tflite


class TestTflite:
    def test_tflite_reader_reads_written_models(self) -> None:
        (graph,) = tflite.read(MODEL).subgraphs
        assert [operator.name for operator in graph.operators] == ["TRANSPOSE", "CONV_2D", "TRANSPOSE"]
        convolution = graph.operators[1]
        assert convolution.attrs["padding"] == "SAME"
        assert [tensor and tensor.dtype for tensor in convolution.inputs] == ["INT8", "INT8", "INT32"]
        assert convolution.outputs[0].shape == (1, 8, 8, 8)
        assert graph.inputs[0].quantization is not None
        assert graph.inputs[0].buffer is None

    @pytest.mark.data
    def test_reads_every_real_file(self, data_folder: Path) -> None:
        files = sorted(data_folder.rglob("*.tflite"))
        assert len(files) > 10
        for file in files:
            model = tflite.read(file.read_bytes(), file.name)
            assert model.subgraphs[0].operators
            names = {operator.name for operator in model.subgraphs[0].operators}
            assert ("NeutronGraph" in names) == file.stem.endswith("_npu")

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "byte 0: expected a .* of at least 8 bytes"),
            (b"TFL3TFL3", "byte 860636756: expected a table"),
            (b"\x08\0\0\0ONNX" + bytes(16), "byte 4: expected the identifier 'TFL3', found b'ONNX'"),
            (MODEL[:400], "byte"),
        ],
    )
    def test_refuses_damaged_files(self, data: bytes, message: str) -> None:
        with pytest.raises(FormatError, match=message):
            tflite.read(data)


class TestPte:
    def test_pte_reader_equals_executorch(self) -> None:
        ours, plan = pte.read(PROGRAM), deserialize_pte_binary(PROGRAM).program.execution_plan[0]
        method, names = ours.methods
        assert names.name == "input_names"
        assert method.name == plan.name
        assert [delegate.backend for delegate in method.delegates] == [delegate.id for delegate in plan.delegates]
        specs = [{spec.key: bytes(spec.value) for spec in delegate.compile_specs} for delegate in plan.delegates]
        assert [dict(delegate.compile_specs) for delegate in method.delegates] == specs
        kernels = [call.name for call in method.calls if isinstance(call, pte.KernelCall)]
        assert kernels == [
            "quantized_decomposed::quantize_per_tensor.out", "quantized_decomposed::dequantize_per_tensor.out",
            "aten::sigmoid.out", "quantized_decomposed::quantize_per_tensor.out",
            "quantized_decomposed::dequantize_per_tensor.out",
        ]  # fmt: skip
        assert [value.shape for value in method.inputs] == [(1, 3, 8, 8)]
        assert [(value.shape, value.dtype) for value in method.outputs] == [((1, 4, 8, 8), "float32")]
        assert method.planned_bytes == tuple(plan.non_const_buffer_sizes[1:])

    def test_payloads_of_other_sizes_fit(self) -> None:
        delegates = pte.read(PROGRAM).methods[0].delegates
        for extra in (-1000, -1, 1, 127, 5000):
            payloads = {
                delegate.segment: (bytes(delegate.payload) + bytes(5000))[: len(delegate.payload) + extra]
                for delegate in delegates
                if delegate.segment is not None
            }
            changed = pte.replace_payloads(PROGRAM, payloads)
            found = pte.read(changed).methods[0].delegates
            assert [bytes(delegate.payload) for delegate in found] == list(payloads.values())
            assert deserialize_pte_binary(changed).program.execution_plan[0].delegates

    def test_replacing_nothing_changes_nothing(self) -> None:
        assert pte.replace_payloads(PROGRAM, {}) == PROGRAM

    def test_unknown_segments_are_refused(self) -> None:
        with pytest.raises(FormatError, match="has 3 segments, but no segment 7"):
            pte.replace_payloads(PROGRAM, {7: b""})


# As in test_profiling.py.
LOG = (
    b'Graphs: = Extract Graphs =\nNeutronOperator "subgraph_1":\nKernels:\n A\n B\n\nGenerate code for NeutronGraph\n'
    b"Graphs:\nName: subgraph_1\nInputs:\nOutputs:\nTensors:\nType: ADD\nInputs:\n [0]: t\nOutputs:\n"
    b" [0]: u\nLocation: 0"
)
WORDS = (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", bytes(4), b"\1\0\0\0")


def mutated(original: bytes) -> st.SearchStrategy[bytes]:
    """Returns the file with some bytes changed, removed or repeated."""
    position = st.integers(0, len(original) - 1)

    @st.composite
    def draw(draw: st.DrawFn) -> bytes:
        data = bytearray(original)
        for _ in range(draw(st.integers(1, 4))):
            at = min(draw(position), len(data) - 1)
            kind = draw(st.sampled_from(("byte", "word", "small", "cut", "double", "end")))
            if kind == "byte":
                data[at] = draw(st.integers(0, 255))
            elif kind == "word":
                data[at : at + 4] = draw(st.sampled_from(WORDS))
            elif kind == "small":  # positions of an index, a size or a code
                at -= at % 4
                data[at : at + 4] = draw(st.integers(0, 20)).to_bytes(4, "little")
            elif kind == "cut":
                del data[at : at + draw(st.integers(1, 64))]
            elif kind == "double":
                data[at:at] = data[at : at + draw(st.integers(1, 64))]
            else:
                del data[at:]
            if not data:
                break
        return bytes(data)

    return draw()


def inspect_any(data: bytes) -> None:
    inspect_bytes(data, "the file")


def inspect_in_a_program(model: bytes) -> None:
    """Returns the report of a `.pte` with these bytes as payload."""
    header = parse(pte.read(PROGRAM).methods[0].delegates[0].payload).header
    segment = pte.read(PROGRAM).methods[0].delegates[0].segment
    assert segment is not None
    inspect_bytes(pte.replace_payloads(PROGRAM, {segment: pack_portable(header, model)}), "the file")


READERS: dict[str, tuple[Callable[[bytes], object], bytes]] = {
    "tflite": (tflite.read, MODEL),
    "pte": (pte.read, PROGRAM),
    "inspected tflite": (inspect_any, MODEL),
    "inspected pte": (inspect_any, PROGRAM),
    "inspected payload": (inspect_in_a_program, MODEL),
    "payload": (parse, bytes(pte.read(PROGRAM).methods[0].delegates[0].payload)),
    "kernels": (lambda data: kernels_of(data.decode(errors="replace"), MODEL), LOG),
}


@pytest.mark.parametrize(("read", "original"), READERS.values(), ids=READERS)
def test_random_bytes_do_not_crash_a_reader(read: Callable[[bytes], object], original: bytes) -> None:
    @settings(max_examples=300, deadline=None)
    @given(st.one_of(mutated(original), st.binary(max_size=200)))
    def check(data: bytes) -> None:
        start = time.monotonic()
        tracemalloc.reset_peak()
        held, _ = tracemalloc.get_traced_memory()
        with contextlib.suppress(FormatError, PayloadError, OptionError, TargetError):
            read(data)
        _, peak = tracemalloc.get_traced_memory()
        assert time.monotonic() - start < SLOWEST_SECONDS
        assert peak - held < MOST_BYTES

    tracemalloc.start()
    try:
        check()
    finally:
        tracemalloc.stop()

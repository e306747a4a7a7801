"""Programs on this machine: numbers, memory formats, threads, and the interface of `HostProgram`."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter
from executorch.exir import to_edge
from tests.oracle import Function
from tests.runtime_calls import (
    SHAPE,
    Shape,
    assert_equal,
    blank,
    device_payload,
    double_payload,
    random_int8,
    single_call,
)
from tests.runtime_models import Call, add_sub_model, double_model, litert, pte, straight_header

from openneutron import lower, quantize
from openneutron.errors import HostError, InputError
from openneutron.formats.payload import PayloadHeader, pack_portable
from openneutron.runtime import HostProgram, TensorInfo, _host, load


@pytest.fixture(scope="module")
def doubling() -> bytes:
    return single_call(double_payload())


class TestNumbers:
    def test_one_output_is_a_tensor(self, doubling: bytes) -> None:
        x = random_int8(SHAPE)
        output = HostProgram.from_bytes(doubling).run(x)
        assert isinstance(output, torch.Tensor)
        assert_equal(output, litert(double_model(SHAPE), x))

    @pytest.mark.parametrize("input_map", [(0, 1), (1, 0)])
    @pytest.mark.parametrize("output_map", [(0, 1), (1, 0)])
    def test_maps(self, input_map: tuple[int, int], output_map: tuple[int, int]) -> None:
        tflite = add_sub_model(SHAPE)
        header = PayloadHeader((0, 0), (0, 0), input_map, output_map, 2)
        arguments = random_int8(SHAPE, 1), random_int8(SHAPE, 2)
        results = litert(tflite, *(arguments[i] for i in input_map))
        outputs = HostProgram.from_bytes(single_call(pack_portable(header, tflite), 2, 2)).run(*arguments)
        assert_equal(outputs, [results[output_map.index(i)] for i in range(2)])

    def test_one_argument_feeds_two_inputs_and_another_feeds_none(self) -> None:
        tflite = add_sub_model(SHAPE)
        header = PayloadHeader((0, 0), (0, 0), (2, 2), (0, 1), 3)
        arguments = [random_int8(SHAPE, seed) for seed in range(3)]
        outputs = HostProgram.from_bytes(single_call(pack_portable(header, tflite), 3, 2)).run(*arguments)
        assert_equal(outputs, litert(tflite, arguments[2], arguments[2]))

    def test_several_delegates_in_one_program(self) -> None:
        doubling, tflite = double_payload(), add_sub_model(SHAPE)
        both = pack_portable(straight_header(2, 2), tflite)
        calls = [
            Call(doubling, (0,), (SHAPE,)),  # 2 = 2a
            Call(both, (2, 1), (SHAPE, SHAPE)),  # 3, 4 = 2a + b, 2a - b
            Call(doubling, (4,), (SHAPE,)),  # 5
        ]
        a, b = random_int8(SHAPE, 3), random_int8(SHAPE, 4)
        (twice,) = litert(double_model(SHAPE), a)
        total, difference = litert(tflite, twice, b)
        outputs = HostProgram.from_bytes(pte(calls, [blank(SHAPE)] * 2, [3, 5])).run(a, b)
        assert_equal(outputs, [total, *litert(double_model(SHAPE), difference)])

    def test_several_programs_in_one_process(self, doubling: bytes) -> None:
        tflite = add_sub_model((2, 3))
        other = HostProgram.from_bytes(single_call(pack_portable(straight_header(2, 2), tflite), 2, 2, (2, 3)))
        programs = [HostProgram.from_bytes(doubling) for _ in range(3)]
        a, b = random_int8((2, 3), 5), random_int8((2, 3), 6)
        for seed, program in enumerate(programs):
            x = random_int8(SHAPE, seed)
            assert_equal(program.run(x), litert(double_model(SHAPE), x))
            assert_equal(other.run(a, b), litert(tflite, a, b))

    @pytest.mark.data
    @pytest.mark.parametrize(
        "name",
        [
            "mlperf_tiny/kws_ref_model.tflite",
            "mlperf_tiny/ad01_int8.tflite",
            "mlperf_tiny/vww_96_int8.tflite",
            "mlperf_tiny/pretrainedResnet_quant.tflite",
            "mlperf_tiny/str_ww_ref_model.tflite",
            "vendor/ref/cifarnet_quant_int8.tflite",  # this output and the next are dequantized
            "vendor/ref/mobilenet_v1_0.25_128_quant_int8.tflite",
        ],
    )
    @pytest.mark.parametrize("channels_last", [False, True])
    def test_real_networks(
        self, data_folder: Path, name: str, channels_last: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # These models have operators and fields that OpenNeutron does not write.
        monkeypatch.setattr("openneutron.formats.tflite.check", lambda _: None)
        tflite = (data_folder / name).read_bytes()
        interpreter = Interpreter(model_content=tflite)
        shape = tuple(int(size) for size in interpreter.get_input_details()[0]["shape"])
        output = interpreter.get_output_details()[0]
        returned = torch.from_numpy(np.zeros(output["shape"], output["dtype"]))
        flag = int(channels_last and len(shape) == 4)
        payload = pack_portable(PayloadHeader((flag,), (0,), (0,), (0,), 1), tflite)
        x = random_int8(shape)
        given = np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if flag else x
        call = Call(payload, (0,), (tuple(returned.shape),), returned.dtype)
        program = HostProgram.from_bytes(pte([call], [torch.from_numpy(given)], [1]))
        assert_equal(program.run(given), litert(tflite, x))


class TestFormats:
    """A flag means that the TFLite tensor is channels last: [N, ..., C] for an argument [N, C, ...]."""

    @pytest.mark.parametrize(
        "shape",
        [
            (1, 4, 6, 8),
            (3, 5, 7, 2),
            (1, 1, 6, 8),
            (2, 130, 9, 15),
            (1, 4, 6),
            (2, 3, 4),
            (1, 3, 1, 1),
            (2, 3, 4, 5, 6),
        ],
    )
    def test_contiguous_arguments_are_transposed(self, shape: Shape) -> None:
        # Without the flag, the program reads the TFLite tensor's memory unchanged, so a missing transpose changes the
        # result.
        last = (shape[0], *shape[2:], shape[1])
        tflite = double_model(last)
        calls = [
            Call(pack_portable(PayloadHeader((taken,), (given,), (0,), (0,), 1), tflite), (1 - taken,), (returned,))
            for taken, given, returned in ((0, 1, shape), (1, 0, last), (1, 1, shape))
        ]
        program = HostProgram.from_bytes(pte(calls, [blank(shape), blank(last)], [2, 3, 4]))
        x = random_int8(last)
        (y,) = litert(tflite, x)
        first = np.moveaxis(y, -1, 1)
        assert_equal(program.run(np.ascontiguousarray(np.moveaxis(x, -1, 1)), x), [first, y, first])

    def test_channels_last_arguments_are_copied_without_transposes(self) -> None:
        last = (1, 6, 8, 4)
        payload = pack_portable(PayloadHeader((1,), (1,), (0,), (0,), 1), double_model(last))
        example = blank(SHAPE).to(memory_format=torch.channels_last)
        program = HostProgram.from_bytes(pte([Call(payload, (0,), (SHAPE,))], [example], [1]))
        x = random_int8(last)
        expected = np.moveaxis(litert(double_model(last), x)[0], -1, 1)
        assert_equal(program.run(torch.from_numpy(np.moveaxis(x, -1, 1))), [expected])

    def test_the_callers_memory_format_does_not_matter(self, doubling: bytes) -> None:
        # ExecuTorch reads an input's memory unchanged, so run() must convert it to the program's memory format.
        program = HostProgram.from_bytes(doubling)
        x = random_int8(SHAPE)
        expected = litert(double_model(SHAPE), x)
        tensor = torch.from_numpy(x)
        strided = torch.from_numpy(np.repeat(x, 2, axis=3))[..., ::2]
        for variant in (tensor.to(memory_format=torch.channels_last), strided):
            assert not variant.is_contiguous()
            assert_equal(program.run(variant), expected)

    def test_unflagged_argument_must_be_contiguous(self) -> None:
        example = blank(SHAPE).to(memory_format=torch.channels_last)
        program = HostProgram.from_bytes(pte([Call(double_payload(), (0,), (SHAPE,))], [example], [1]))
        with pytest.raises(HostError, match="delegate argument 0 is not contiguous"):
            program.run(random_int8(SHAPE))

    def test_flagged_argument_must_have_the_models_channels(self) -> None:
        payload = pack_portable(PayloadHeader((1,), (0,), (0,), (0,), 1), double_model(SHAPE))
        program = HostProgram.from_bytes(single_call(payload))
        with pytest.raises(HostError, match="delegate argument 0 has 4 channels, the TFLite model 8"):
            program.run(random_int8(SHAPE))

    def test_flagged_argument_must_have_channels(self) -> None:
        payload = pack_portable(PayloadHeader((1,), (0,), (0,), (0,), 1), double_model((8,)))
        program = HostProgram.from_bytes(single_call(payload, shape=(8,)))
        with pytest.raises(HostError, match="argument 0 cannot be converted to channels last: it has no channels"):
            program.run(random_int8((8,)))


class TestThreads:
    def test_one_program_from_many_threads(self, doubling: bytes) -> None:
        program = HostProgram.from_bytes(doubling)
        inputs = [random_int8(SHAPE, seed) for seed in range(64)]
        with ThreadPoolExecutor(8) as pool:
            outputs = list(pool.map(program.run, inputs))
        for x, y in zip(inputs, outputs, strict=True):
            assert_equal(y, litert(double_model(SHAPE), x))

    def test_programs_are_used_and_dropped_in_other_threads(self, doubling: bytes) -> None:
        x = random_int8(SHAPE)
        with ThreadPoolExecutor(1) as maker, ThreadPoolExecutor(1) as user:
            outputs = user.submit(maker.submit(HostProgram.from_bytes, doubling).result().run, x).result()
        gc.collect()
        assert_equal(outputs, litert(double_model(SHAPE), x))

    def test_each_thread_has_its_own_error(self, doubling: bytes) -> None:
        broken = single_call(device_payload())
        with ThreadPoolExecutor(1) as pool:
            with pytest.raises(HostError):
                pool.submit(HostProgram.from_bytes, broken).result()
            assert "microcode" in pool.submit(_host.last_error).result()
        HostProgram.from_bytes(doubling)
        assert _host.last_error() == ""


class TestProgram:
    def test_metadata(self) -> None:
        payload = pack_portable(straight_header(2, 2), add_sub_model(SHAPE))
        program = HostProgram.from_bytes(single_call(payload, 2, 2))
        assert program.inputs == program.outputs == (TensorInfo(SHAPE, torch.int8),) * 2
        assert program.input_shapes == program.output_shapes == (SHAPE, SHAPE)

    def test_tensors_and_arrays_give_the_same(self, doubling: bytes) -> None:
        program = HostProgram.from_bytes(doubling)
        x = random_int8(SHAPE)
        x.flags.writeable = False
        expected = litert(double_model(SHAPE), x)
        assert_equal(program.run(x), expected)
        assert_equal(program.run(torch.tensor(x)), expected)
        assert_equal(program.run(np.asfortranarray(x)), expected)

    def test_outputs_belong_to_the_caller(self, doubling: bytes) -> None:
        program = HostProgram.from_bytes(doubling)
        x = random_int8(SHAPE)
        first = program.run(x)
        program.run(random_int8(SHAPE, 9))
        del program
        gc.collect()
        assert_equal(first, litert(double_model(SHAPE), x))

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ((), "takes 1 inputs, got 0"),
            ((blank(SHAPE), blank(SHAPE)), "takes 1 inputs, got 2"),
            ((blank((1, 4, 8, 6)),), r"input 'input0' has shape \(1, 4, 8, 6\), expected \(1, 4, 6, 8\)"),
            ((torch.zeros(SHAPE),), "input 'input0' has dtype torch.float32, expected torch.int8"),
            ((np.zeros(SHAPE, object),), "input 'input0': can't convert np.ndarray of type numpy.object_"),
            (("text",), "input 'input0' is a str, expected a torch tensor or a numpy array"),
            (([1, 2],), "does not contain the structure of its inputs: give only the tensors, in order"),
        ],
    )
    def test_inputs_are_checked(self, doubling: bytes, inputs: tuple[Any, ...], message: str) -> None:
        with pytest.raises(InputError, match=message):
            HostProgram.from_bytes(doubling).run(*inputs)

    def test_load(self, doubling: bytes, tmp_path: Path) -> None:
        path = tmp_path / "double.pte"
        path.write_bytes(doubling)
        x = random_int8(SHAPE)
        for spelled in (path, str(path)):
            assert_equal(load(spelled).run(x), litert(double_model(SHAPE), x))

    def test_load_of_an_unreadable_file(self, tmp_path: Path) -> None:
        with pytest.raises(HostError, match=r"missing\.pte cannot be read: No such file"):
            load(tmp_path / "missing.pte")
        with pytest.raises(HostError, match=r"'a\\x00b\.pte' cannot be read: it has a character that no path has"):
            load("a\0b.pte")
        with pytest.raises(HostError, match="cannot be read: Is a directory"):
            load(tmp_path)

    def test_load_of_a_file_that_is_not_a_program(self, tmp_path: Path, doubling: bytes) -> None:
        for content in (b"", b"PK\3\4 a zip file", double_model(SHAPE)):
            path = tmp_path / "other.pte"
            path.write_bytes(content)
            with pytest.raises(HostError, match=r"other\.pte is not an ExecuTorch program"):
                load(path)
        for length in (8, 64, len(doubling) // 2):
            with pytest.raises(HostError, match="cannot be loaded: "):
                HostProgram.from_bytes(doubling[:length])

    def test_program_without_forward(self) -> None:
        class Add(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x + x

        exported = torch.export.export(Add(), (torch.zeros(2),))
        data = bytes(to_edge({"other": exported}).to_executorch().buffer)
        with pytest.raises(HostError, match="cannot be loaded: "):
            HostProgram.from_bytes(data)
        with pytest.raises(ValueError, match="no method 'forward'"):
            _host.input_dim_orders(data, "forward")

    def test_quantize_and_dequantize_on_the_cpu(self) -> None:
        import executorch.kernels.quantized  # noqa: F401  the export needs the out variants
        from torch.ao.quantization.fx import _decomposed  # noqa: F401  defines the operators

        operators = torch.ops.quantized_decomposed

        class QuantizeDequantize(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                q = operators.quantize_per_tensor(x, 0.5, 3, -128, 127, torch.int8)
                y: torch.Tensor = operators.dequantize_per_tensor(q, 0.5, 3, -128, 127, torch.int8)
                return y

        x = torch.linspace(-100, 100, 32)
        data = to_edge(torch.export.export(QuantizeDequantize(), (x,))).to_executorch().buffer
        output = HostProgram.from_bytes(bytes(data)).run(x)
        assert isinstance(output, torch.Tensor)
        torch.testing.assert_close(output, QuantizeDequantize()(x), rtol=0, atol=0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_dropped_programs_is_given_back() -> None:
    megabyte = 1 << 20
    tflite = double_model(SHAPE) + bytes(megabyte)  # other bytes may follow a flatbuffer
    data = single_call(pack_portable(straight_header(1, 1), tflite))
    x = random_int8(SHAPE)

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def use(times: int) -> None:
        for _ in range(times):
            HostProgram.from_bytes(data).run(x)

    def growth() -> int:
        before = resident()
        use(230)
        return resident() - before

    use(20)  # warm up allocators and caches
    # Each program copies 1 MB of TFLite: a leak of the engine would hold 230 MB, a leak in 5 % of the programs 11 MB,
    # each time. The allocator may grow once, after other tests in this process.
    assert any(growth() < 10 * megabyte for _ in range(2))


def run_python(code: str, *arguments: str) -> str:
    """Returns the standard output of `code` in a new interpreter, which must exit normally while its programs exist."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestFreshProcess:
    @pytest.fixture(scope="class")
    def file(self, doubling: bytes, tmp_path_factory: pytest.TempPathFactory) -> str:
        path = tmp_path_factory.mktemp("pte") / "double.pte"
        path.write_bytes(doubling)
        return str(path)

    def test_running_imports_neither_exir_nor_torchao(self, file: str) -> None:
        loaded = run_python(
            """
import sys
import numpy as np
from openneutron.runtime import load
program = load(sys.argv[1])
print(program.run(np.full((1, 4, 6, 8), 21, np.int8)).unique().tolist())
print(sorted(name for name in sys.modules if name.startswith(("executorch.exir", "executorch.runtime", "torchao"))))
""",
            file,
        )
        assert loaded.splitlines() == ["[42]", "[]"]

    @pytest.mark.parametrize("first", ["import openneutron.runtime", "import executorch.runtime"])
    def test_executorchs_own_runtime(self, file: str, first: str) -> None:
        output = run_python(
            f"""
{first}
import sys, torch, openneutron.runtime
from executorch.runtime import Runtime
runtime = Runtime.get()
print(runtime.backend_registry.is_available("NeutronBackend"))
method = runtime.load_program(sys.argv[1]).load_method("forward")
print(method.execute([torch.full((1, 4, 6, 8), 21, dtype=torch.int8)])[0].unique().tolist())
""",
            file,
        )
        assert output.splitlines() == ["True", "[42]"]


@pytest.mark.parametrize("strides", [(1, 3), (1, 1), (5, 7)])
def test_inputs_without_elements_of_any_strides(strides: tuple[int, int]) -> None:
    """The runtime ends the process for strides that do not follow from the sizes."""
    inputs = (torch.ones(1, 4), torch.empty(0, 3))
    model = Function(lambda x, empty: (x * 2, empty.sum(0))).eval()
    program = lower(quantize(model, inputs, [inputs], recover=None, progress=False))
    doubled, total = program.run(inputs[0], torch.empty_strided((0, 3), strides))
    torch.testing.assert_close(doubled, inputs[0] * 2, atol=0.02, rtol=0.0)
    assert torch.equal(total, torch.zeros(3))

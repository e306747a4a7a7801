"""The files of a package, and wrong input: typed errors that leave no files."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from tests.firmware_models import IMAGE, PROGRAMS, program
from torch import nn

from openneutron.errors import FormatError, InputError, OptionError, OutputError
from openneutron.firmware import package
from openneutron.firmware.io_functions import io_contents, io_header
from openneutron.firmware.ports import Port
from openneutron.firmware.vectors import Vectors, read_vectors, vectors_header
from openneutron.formats import pte
from openneutron.formats.bundled import BundledTensor, bundle

NAMES = {
    "CMakeLists.txt", "README.md", "host_backend.cpp", "host_backend.h", "kernels.cmake", "kernels.yaml", "main.cpp",
    "manifest.json", "net.bpte", "net.c", "net.h", "net.pte", "net_config.h", "net_io.h", "profile_tracer.h",
    "python.cmake", "test_vectors.bin", "test_vectors.c", "test_vectors.h",
}  # fmt: skip


def test_a_package_contains_and_describes_the_program(tmp_path: Path) -> None:
    found = program("int8").package(tmp_path / "firmware", name="net", section=".flash")
    folder = found.folder
    assert set(found.files) == NAMES == {path.name for path in folder.iterdir()}
    assert (found.kind, found.vectors) == ("portable", 3)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["inputs"][0]["dim_order"] == [0, 2, 3, 1]
    assert manifest["inputs"][0]["scale"] == program("int8").inputs[0].scale
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    data = program("int8").buffer
    assert (folder / "net.pte").read_bytes() == data
    source = (folder / "net.c").read_text()
    assert '#include "net.h"' in source
    assert "extern" not in source
    numbers = source[source.rindex("{") + 1 : source.rindex("}")].replace("\n", "").rstrip(",").split(",")
    assert bytes(map(int, numbers)) == data
    assert '#define NET_SECTION ".flash"' in source
    assert hashlib.sha256(data).hexdigest() in (folder / "net.h").read_text()
    left = [name for name in NAMES if re.search(rb"@\w+@", (folder / name).read_bytes()) and name != "net.pte"]
    assert not left  # every place of the templates is filled


def test_equal_programs_give_equal_packages(tmp_path: Path) -> None:
    for name in ("a", "b"):
        program("int8").package(tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_memory_sizes_equal_the_program(tmp_path: Path) -> None:
    found = program("floats").package(tmp_path / "firmware")
    text = (found.folder / "model_config.h").read_text()
    memory = program("floats").memory
    host, device = re.findall(r"define MODEL_METHOD_POOL_BYTES \(?(\d+)u", text)
    assert (int(host), int(device)) == (memory.host.method.pool_bytes, memory.device.method.pool_bytes)
    assert re.findall(r"define MODEL_PLANNED_\d_BYTES (\d+)u", text) == [str(one.bytes) for one in memory.planned]


def test_memory_of_unknown_size_is_named_where_it_is_allocated(tmp_path: Path) -> None:
    exported = torch.export.export(nn.Linear(4, 4).eval(), (torch.randn(1, 4),))
    other = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
    folder = package(bytes(other.buffer), tmp_path / "firmware").folder
    device = (folder / "model_config.h").read_text().partition("#else")[2]
    unknown = r"/\* Not counted, because its size is unknown here: memory of XnnpackBackend\. \*/\n"
    for pool in ("METHOD", "TEMPORARY"):
        assert re.search(rf"{unknown}#ifndef MODEL_{pool}_POOL_BYTES\n", device)
        row = rf"\| [\d,]+, and of unknown size: memory of XnnpackBackend \| `MODEL_{pool}_POOL_BYTES` \|"
        assert re.search(row, (folder / "README.md").read_text())


def test_memory_of_known_size_has_no_remark(tmp_path: Path) -> None:
    folder = program("int8").package(tmp_path / "firmware").folder
    assert "unknown" not in (folder / "model_config.h").read_text()
    readme = (folder / "README.md").read_text()
    assert re.search(r"\| [\d,]+, and of unknown size: the driver's contexts \| `MODEL_METHOD_POOL_BYTES` \|", readme)
    assert re.search(r"\| [\d,]+, with an estimate of the NPU's scratch \| `MODEL_TEMPORARY_POOL_BYTES` \|", readme)


def test_the_readme_has_a_row_for_each_file(tmp_path: Path) -> None:
    for name, array in (("int8", "c"), ("nothing", "incbin"), ("cpu", "auto")):
        found = program(name).package(tmp_path / name, array=array)
        text = (found.folder / "README.md").read_text()
        rows = re.findall(r"^\| `([\w.]+)` \| [^|]+ \|$", text, re.MULTILINE)
        assert sorted(rows) == sorted(found.files)
        kind = "it has no delegates for" if name == "cpu" else "its delegates hold TFLite models for the host"
        assert kind in text


CODES = Port("x", "int8", (1, 4), (0, 1), 0.5, 0)
IMAGES = Port("x", "float32", (1, 3, 4, 4), (0, 2, 3, 1))
VALUES = Port("x", "float32", (2, 4), (0, 1))
SCORES = Port("y", "float32", (1, 4), (0, 1))


@pytest.mark.parametrize(
    ("given", "output", "contents"),
    [
        (VALUES, VALUES, "no functions: no value needs a conversion"),
        (VALUES, SCORES, "functions that find the largest scores and compute softmax"),
        (IMAGES, VALUES, "functions that reorder values"),
        (CODES, VALUES, "functions that quantize inputs"),
        (VALUES, CODES, "functions that dequantize outputs, find the largest scores and compute softmax"),
        (CODES, replace(IMAGES, name="y"), "functions that quantize inputs, reorder values"),
    ],
)
def test_the_row_of_the_conversions_lists_the_functions_of_the_header(given: Port, output: Port, contents: str) -> None:
    found = io_contents((given,), (output,))
    assert found == contents
    header = io_header("", "net", (given,), (output,))
    functions = {"quantize inputs": "net_quantize_", "dequantize": "net_dequantize_", "reorder": "_to_channels_"}
    for word, function in functions.items():
        assert (word in found) is (function in header)


def test_the_readme_of_a_package_names_its_conversions(tmp_path: Path) -> None:
    folder = program("int8").package(tmp_path / "firmware", name="net").folder
    header = (folder / "net_io.h").read_text()
    (row,) = re.findall(r"^\| `net_io\.h` \| ([^|]+) \|$", (folder / "README.md").read_text(), re.MULTILINE)
    assert ("quantize inputs" in row) is ("net_quantize_input0" in header) is True


@pytest.mark.parametrize("value", [2**53 + 1, -(2**63), 2**63 - 1])
def test_integer_inputs_are_written_without_rounding(value: int) -> None:
    ports = (Port("count", None, constant=value),)
    text = vectors_header("", "net", Vectors(((value,),), ((),)), ports, (), tolerance=1)
    written = "INT64_MIN" if value == -(2**63) else f"INT64_C({value})"
    assert f"{{1, 0, 0, {{0}}, {{0}}, 0, 0, {written}, 0, 0.0f}}" in text


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_kernels_equal_the_tool_of_executorch(name: str, tmp_path: Path) -> None:
    from executorch.codegen.tools import gen_oplist

    found = program(name).package(tmp_path / "firmware")
    gen_oplist.gen_oplist(tmp_path / "selected.yaml", model_file_path=str(found.folder / "model.pte"))
    expected = (tmp_path / "selected.yaml").read_text().replace(str(found.folder / "model.pte"), "model.pte")
    ours = (found.folder / "kernels.yaml").read_text()
    # The tool writes keys in any order, and long ones on two lines.
    assert sorted(set(ours.split())) == sorted(set(expected.split()))
    cmake = (found.folder / "kernels.cmake").read_text()
    operators = {call.name for call in pte.read(program(name).buffer).methods[0].calls if hasattr(call, "name")}
    assert all(f'"{operator}"' in cmake for operator in operators)


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_one_library_has_the_kernels_of_several_programs(tmp_path: Path) -> None:
    folder = program("floats").package(tmp_path / "firmware", name="net").folder
    (tmp_path / "tools" / "cmake").mkdir(parents=True)
    lines = ["function(gen_selected_ops)", "  message(STATUS ${ARGV})", "endfunction()"]
    lines += [f"function({name})\nendfunction()" for name in ("generate_bindings_for_kernels", "gen_operators_lib")]
    (tmp_path / "tools" / "cmake" / "Codegen.cmake").write_text("\n".join(lines))
    own = "quantized_decomposed::quantize_per_tensor.out"
    for more, count in ((None, 0), (f"aten::cos.out;{own}", 1)):
        options = [f"-DEXECUTORCH_ROOT={tmp_path}"] + ([] if more is None else [f"-DOPENNEUTRON_MORE_OPERATORS={more}"])
        command = ["cmake", *options, "-P", "kernels.cmake"]
        text = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
        assert (text.count("aten::cos.out"), text.count(own)) == (count, 1)


def test_a_bundled_program_is_read_by_executorch() -> None:
    from executorch.devtools.bundled_program.serialize import deserialize_from_flatbuffer_to_bundled_program

    tensor = BundledTensor(6, (1, 2), (0, 1), np.array([1, 2], np.float32).tobytes())
    data = bundle(b"program", "forward", [([tensor, 3, 2.5, True], [tensor])] * 2)
    found = deserialize_from_flatbuffer_to_bundled_program(data)
    assert (found.program, found.version) == (b"program", 2)
    suite = found.method_test_suites[0]
    assert (suite.method_name, len(suite.test_cases)) == ("forward", 2)
    values = [value.val for value in suite.test_cases[1].inputs]
    assert (values[0].sizes, values[0].data, values[0].dim_order) == ([1, 2], tensor.data, [0, 1])
    assert (values[1].int_val, values[2].double_val, values[3].bool_val) == (3, 2.5, True)


def test_a_program_without_outputs_gets_no_bundled_program(tmp_path: Path) -> None:
    found = program("nothing").package(tmp_path / "firmware")
    assert "model.bpte" not in found.files


def test_large_arrays_are_assembler_source(tmp_path: Path) -> None:
    found = program("int8").package(tmp_path / "firmware", array="incbin")
    assert {"model.S", "test_vectors.S"} < set(found.files)
    assert '.incbin "model.pte"' in (found.folder / "model.S").read_text()
    assert "LANGUAGES C CXX ASM" in (found.folder / "CMakeLists.txt").read_text()


def test_samples_are_quantized_and_run_in_order(tmp_path: Path) -> None:
    net = program("int8")
    samples = [torch.randn(IMAGE).to(memory_format=torch.channels_last) for _ in range(2)]
    found = net.package(tmp_path / "firmware", samples=samples)
    data = np.frombuffer((found.folder / "test_vectors.bin").read_bytes(), np.int8).reshape(2, -1)
    for row, sample in zip(data, samples, strict=True):
        codes = net.inputs[0].quantize(sample)
        assert row[:144].tolist() == codes.permute(0, 2, 3, 1).reshape(-1).tolist()
        assert row[144:151].tolist() == net.run(codes).reshape(-1).tolist()


def test_vectors_are_read_from_a_file(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {"input0": np.zeros((2, *IMAGE), np.int8), "output0": np.full((2, 1, 7), 5, np.int8)}
    np.savez(tmp_path / "vectors.npz", **arrays)
    found = program("int8").package(tmp_path / "firmware", vectors=tmp_path / "vectors.npz")
    assert found.vectors == 2
    data = (found.folder / "test_vectors.bin").read_bytes()
    assert data == (bytes(144) + bytes([5] * 7) + bytes(9)) * 2


@pytest.mark.parametrize(
    ("names", "outputs", "values"),
    [
        (["input0", "output0", "output1"], ["boxes", "scores"], [0, 1, 2]),
        (["input0", "boxes", "scores"], ["boxes", "scores"], [0, 1, 2]),
        (["x", "scores", "boxes"], ["boxes", "scores"], [0, 2, 1]),
        (["input0", "output1", "output2"], ["output1", "output2"], [0, 1, 2]),
        (["input0", "output0", "output1"], ["output1", "output2"], [0, 1, 2]),
        (["input0", "x", "y"], ["x", "y"], [0, 1, 2]),
    ],
)
def test_vectors_with_names(tmp_path: Path, names: list[str], outputs: list[str], values: list[int]) -> None:
    """Arrays have positions, or the names that `run` gives outputs."""
    arrays: dict[str, Any] = {name: np.full((2, 1), value, np.float32) for value, name in enumerate(names)}
    np.savez(tmp_path / "vectors.npz", **arrays)
    ports = [Port(name, "float32", (1,)) for name in ("x", *outputs)]
    found = read_vectors(tmp_path / "vectors.npz", ports[:1], ports[1:])
    rows = [[*inputs, *results] for inputs, results in zip(found.inputs, found.outputs, strict=True)]
    assert [[int(value) for value in row] for row in rows] == [values] * 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["x", "output0"], "lack the array 'input0'"),
        (["input0", "boxes"], "lack the array 'output0'"),
    ],
)
def test_vectors_with_names_of_others(tmp_path: Path, names: list[str], message: str) -> None:
    """A name of an input and an output is the output's. Some of the names are not enough."""
    arrays: dict[str, Any] = {name: np.zeros((2, 1), np.float32) for name in names}
    np.savez(tmp_path / "vectors.npz", **arrays)
    ports = [Port(name, "float32", (1,)) for name in ("x", "boxes", "x")]
    with pytest.raises(InputError, match=message):
        read_vectors(tmp_path / "vectors.npz", ports[:1], ports[1:])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"input0": np.zeros((2, *IMAGE), np.int8)}, "lack the array 'output0'"),
        ({"input0": np.zeros((2, 1), np.int8), "output0": np.zeros((2, 1, 7), np.int8)}, "'input0' has shape"),
        ({"input0": np.zeros((2, *IMAGE)), "output0": np.zeros((2, 1, 7), np.int8)}, "dtype float64"),
        ({"input0": np.zeros((2, *IMAGE), np.int8), "output0": np.zeros((1, 1, 7), np.int8)}, "equal first dimensions"),
    ],
)
def test_vectors_that_do_not_fit_are_named(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "vectors.npz", **arrays)
    with pytest.raises(InputError, match=message):
        program("int8").package(tmp_path / "firmware", vectors=tmp_path / "vectors.npz")
    assert not (tmp_path / "firmware").exists()


def damaged_arrays() -> dict[str, bytes]:
    """Returns the bytes of an array, and of archives that are damaged in ways for which numpy raises various errors."""
    array, archive = io.BytesIO(), io.BytesIO()
    np.save(array, np.zeros((2, 7), np.int8))
    np.savez_compressed(archive, input0=np.zeros((2, 700), np.int8))
    data, header = archive.getvalue(), array.getvalue()
    return {
        "one array": header,
        "cut off": data[: len(data) // 2],
        "no archive": b"PK\x03\x04" + bytes(40),
        "compressed data": data[:50] + b"\xff" * 30 + data[80:],
        "bracket in the header": header.replace(b"), }  ", b"), } ]"),
        "large size": header.replace(b"(2, 7), }" + b" " * 16, b"(99999999999999999999,)} "),
        "empty": b"",
        "text": b"0 0 0",
    }


@pytest.mark.parametrize("data", damaged_arrays().values(), ids=damaged_arrays())
def test_files_that_hold_no_vectors_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "vectors.npz").write_bytes(data)
    with pytest.raises(InputError, match=r"Cannot read the test vectors in .*vectors\.npz.*Give a \.npz file"):
        read_vectors(tmp_path / "vectors.npz", [], [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "1st"}, "must be an identifier of C"),
        ({"name": "my-net"}, "must be an identifier of C"),
        ({"name": "größe"}, "must be an identifier of C"),
        ({"name": "a__b"}, "must be an identifier of C"),
        ({"name": ""}, "must be an identifier of C"),
        ({"name": "int"}, "is a keyword"),
        ({"name": "class"}, "is a keyword"),
        *(({"name": name}, "headers or compilers of C or C\\+\\+ define this name")
          for name in ("NULL", "EOF", "linux", "std", "stdin", "INT8_MAX")),
        ({"name": "math"}, "would hide the header <math.h>"),
        ({"name": "String"}, "would hide the header <string.h>"),
        ({"name": "pthread"}, "would hide the header <pthread.h>"),
        ({"name": "Kernels"}, "a file of the package has this name"),
        ({"name": "main"}, "a file of the package has this name"),
        ({"name": "kernel_selection"}, "a file of the package has this name"),
        ({"name": "profile_tracer"}, "a file of the package has this name"),
        ({"name": "n" * 64}, "longer than"),
        ({"vectors": 0}, "positive number of test vectors"),
        ({"tolerance": -1}, "a number of LSBs"),
        ({"tolerance": float("nan")}, "a number of LSBs"),
        ({"section": 'a"b'}, "name of a section"),
        ({"section": "a\nb"}, "name of a section"),
        ({"section": "a\0b"}, r"Give printable ASCII characters without quotes and backslashes"),
        ({"section": "größe"}, "name of a section"),
        ({"vectors": 1.5}, "positive number of test vectors"),
        ({"vectors": 10**12}, r"1,000,000,000,000 test vectors have .* bytes, more than .*Give at most \d"),
        ({"samples": 5}, "'samples' is a list of inputs of the program, not int"),
        ({"array": "hex"}, "one of auto, c, incbin"),
        ({"vector": 1}, r"package\(\) has no option 'vector'\. Did you mean 'vectors'"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        program("int8").package(tmp_path / "firmware", **options)
    assert not (tmp_path / "firmware").exists()


def test_a_folder_with_files_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="is not empty"):
        program("int8").package(tmp_path)
    with pytest.raises(OutputError, match="there is a file of this name"):
        program("int8").package(tmp_path / "file")
    with pytest.raises(OutputError, match="does not exist"):
        program("int8").package(tmp_path / "no" / "firmware")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "firmware").mkdir()
    assert program("int8").package(tmp_path / "firmware").files


def test_a_full_disk_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = 0
    write = os.write

    def write_until_full(descriptor: int, data: bytes) -> int:
        nonlocal writes
        writes += 1
        if writes > 5:
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", write_until_full)
    with pytest.raises(OutputError, match=r"No space left on device\. Free some space"):
        program("int8").package(tmp_path / "firmware")
    assert list(tmp_path.iterdir()) == []


def test_a_program_of_another_version_is_named(tmp_path: Path) -> None:
    data = program("int8").buffer
    other = data[:4] + b"ET13" + data[8:]
    with pytest.raises(FormatError, match="another version of ExecuTorch's runtime \\('ET13', not 'ET12'\\)"):
        package(other, tmp_path / "firmware")
    with pytest.raises(FormatError):
        package(b"no program", tmp_path / "firmware")
    assert list(tmp_path.iterdir()) == []


def test_a_sample_that_does_not_fit_is_named(tmp_path: Path) -> None:
    good = torch.zeros(IMAGE)
    with pytest.raises(InputError, match=r"Test vector 1: .*shape"):
        program("floats").package(tmp_path / "firmware", samples=[good, torch.zeros(1, 4, 5, 5)])
    with pytest.raises(InputError, match="at least one test vector"):
        program("floats").package(tmp_path / "firmware", samples=[])
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_a_package_and_exits_with_2_for_wrong_input(tmp_path: Path) -> None:
    program("floats").save(tmp_path / "model.pte")
    np.save(tmp_path / "sample.npy", np.ones(IMAGE, np.float32))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "openneutron", "package", "model.pte", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    selection = "/* Noyaux sélectionnés */\n".encode()
    (tmp_path / "model_kernel_selection.c").write_bytes(selection)
    found = run("-o", "out", "--name", "kws", "--samples", "sample.npy", "--json")
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "out" / "kernel_selection.c").read_bytes() == selection
    assert json.loads(found.stdout) == {
        "folder": "out", "files": sorted(os.listdir(tmp_path / "out")), "payload": "portable", "vectors": 1,
    }  # fmt: skip
    again = run("-o", "out")
    assert (again.returncode, "is not empty" in again.stderr) == (2, True)


def test_methods_other_than_forward_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pte, "read", lambda *_: pte.Program((), (), 0, 0))
    with pytest.raises(FormatError, match="no method 'forward'"):
        program("int8").package(tmp_path / "firmware")

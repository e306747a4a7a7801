"""Writes the package of a program: a folder of sources for a firmware project."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from openneutron.compile_spec import CompileOptions
from openneutron.core.files import check_new_folder, write_folder
from openneutron.core.json_values import without_infinite_numbers
from openneutron.errors import FormatError, InputError
from openneutron.firmware.arrays import array_source, uses_assembler
from openneutron.firmware.config import PoolSizes, config_header
from openneutron.firmware.contents import table_of_files
from openneutron.firmware.io_functions import io_contents, io_header
from openneutron.firmware.kernels import kernels_cmake, kernels_yaml, operators_of
from openneutron.firmware.options import PackageOptions, with_defaults
from openneutron.firmware.pools import pools_of
from openneutron.firmware.ports import Port, input_ports, output_ports
from openneutron.firmware.templates import filled
from openneutron.firmware.vectors import (
    Vectors,
    check_number_of_vectors,
    computed_vectors,
    largest_rank,
    read_vectors,
    vectors_header,
)
from openneutron.formats import pte
from openneutron.formats.delegate_outputs import BACKEND, check_delegate_outputs
from openneutron.formats.kernel_selection import kernel_selection_text
from openneutron.formats.payload import parse
from openneutron.model.arguments import Leaf
from openneutron.runtime import HostProgram
from openneutron.version import __version__

__all__ = ["Package", "package"]

METHOD = "forward"
NO_DELEGATE, PORTABLE, DEVICE = range(3)
_KINDS = ("no delegates", "portable", "device")
_DEPENDENCIES = ("openneutron", "executorch", "torch", "torchao", "ai-edge-litert")
_EXECUTORCH = "1.5"
_VALIDATE = (
    "`openneutron validate <this folder> --against\nboard.log` compares them with the host, and names known mistakes."
)


@dataclass(frozen=True)
class Package:
    """A written package."""

    folder: Path
    files: tuple[str, ...]
    """The names of the files in it."""
    kind: str
    """What the delegates hold: "portable", "device" or "no delegates"."""
    vectors: int
    """The number of test vectors."""


def package(
    program: bytes,
    folder: str | os.PathLike[str],
    *,
    portable: bytes | None = None,
    leaves: Sequence[Leaf] | None = None,
    kernel_selection: str | bytes | None = None,
    etrecord: bytes | None = None,
    recipe: Mapping[str, Any] | None = None,
    isolated: bool = False,
    **options: Unpack[PackageOptions],
) -> Package:
    """Writes the package of a program to a new folder: sources for a firmware project, and a test of them.

    - `program`: the bytes of a `.pte`.
    - `portable`: for a device program, the portable program that it was compiled from. It computes the vectors.
    - `leaves`: the paths of the inputs in the arguments of `forward`, if the `.pte` has none.
    - `kernel_selection`, `etrecord`: further files that the lowering wrote. `recipe`: an entry of `manifest.json`.
    - `isolated`: whether the program runs in a process of its own, as for `load`.
    - `options`: see `PackageOptions`.

    Raises `OptionError` for wrong options; `OutputError` for a folder that is not empty or cannot be written;
    `FormatError` and `HostError` for a program that is damaged or of another runtime version; `InputError` for samples
    that do not fit, and for a device program without vectors. After an error, no files are left.
    """
    given = with_defaults(options)
    vectors = given["vectors"]
    check_new_folder(folder)
    method = _method(program)
    kind = _kind(method)
    runnable, is_runnable = _runs_on_host(program, kind, portable, vectors)
    host = HostProgram(runnable, "The program", leaves=leaves, loads=is_runnable, isolated=isolated)
    inputs, outputs = input_ports(host, method), output_ports(host, method)
    if isinstance(vectors, int):
        if given["samples"] is None:
            check_number_of_vectors(vectors, inputs, outputs)
        found = computed_vectors(host, given["samples"], vectors)
    else:
        found = read_vectors(vectors, inputs, outputs)
    made = _Files(
        name=given["name"],
        program=program,
        method=method,
        kind=kind,
        inputs=inputs,
        outputs=outputs,
        vectors=found,
        tolerance=given["tolerance"],
        section=given["section"],
        array=given["array"],
        pools=pools_of(program, host.measure() if is_runnable else None),
        portable=portable if kind == DEVICE else None,
    )
    files = made.all()
    if kernel_selection is not None:
        files["kernel_selection.c"] = kernel_selection_text(kernel_selection).encode()
    if etrecord is not None:
        files["etrecord.bin"] = etrecord
    names = (*files, "README.md", "manifest.json", "python.cmake")
    files["README.md"] = made.readme(names).encode()
    files["manifest.json"] = _manifest(made, files, recipe)
    files["python.cmake"] = _python()
    write_folder(folder, files)
    return Package(Path(folder), tuple(sorted(files)), _KINDS[kind], len(found.inputs))


@dataclass(frozen=True)
class _Files:
    """Makes the files of a package."""

    name: str
    program: bytes
    method: pte.Method
    kind: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    vectors: Vectors
    tolerance: float
    section: str | None
    array: str
    pools: PoolSizes
    portable: bytes | None
    """The portable program that a host runs instead of a device program; None if `program` is not for the device, or if
    it is unknown."""

    def all(self) -> dict[str, bytes]:
        """Returns the files by name, without README.md, the manifest and what the lowering wrote."""
        name, upper = self.name, self.name.upper()
        packed = self.vectors.pack(self.inputs, self.outputs)
        ports = (*self.inputs, *self.outputs)
        operators = operators_of(self.method)
        arrays = [
            self._array(name, f"{name}_pte", f"{upper}_SECTION", self.program, default=self.section),
            self._array("test_vectors", f"{name}_vectors", f"{upper}_VECTORS_SECTION", packed),
        ]
        if self.portable is not None:
            stem = f"{name}_portable"
            arrays.append(self._array(stem, f"{stem}_pte", f"{upper}_PORTABLE_SECTION", self.portable))
        sources = dict(arrays)
        texts = {
            f"{name}.h": self._model_header(next(iter(sources))),
            **sources,
            f"{name}_config.h": config_header(self._title(), name, self.pools, self.inputs, self.outputs),
            f"{name}_io.h": io_header(self._title(), name, self.inputs, self.outputs),
            "test_vectors.h": vectors_header(
                self._title(), name, self.vectors, self.inputs, self.outputs, tolerance=self.tolerance
            ),
            "kernels.yaml": kernels_yaml(self.program, operators),
            "kernels.cmake": kernels_cmake(name, operators),
            "main.cpp": self._main(largest_rank(ports)),
            "profile_tracer.h": filled("profile_tracer.h"),
            "host_backend.h": filled("host_backend.h"),
            "host_backend.cpp": filled("host_backend.cpp"),
            "CMakeLists.txt": self._cmake(list(sources)),
        }
        files = {file: text.encode() for file, text in texts.items()}
        files |= {f"{name}.pte": self.program, "test_vectors.bin": packed}
        if self.portable is not None:
            files[f"{name}_portable.pte"] = self.portable
        bundled = self.vectors.bundle(self.program, METHOD, self.inputs, self.outputs)
        return files if bundled is None else {**files, f"{name}.bpte": bundled}

    def _delegates(self) -> str:
        """Returns the end of a sentence about the program."""
        if self.kind == NO_DELEGATE:
            return "it has no delegates for the NPU"
        if self.kind == PORTABLE:
            return "its delegates hold TFLite models for the host (portable)"
        options = _options(self.method)
        return f"its delegates hold microcode for {options.target if options else 'the NPU'}"

    def _title(self) -> str:
        return f'Program "{self.name}", {len(self.program):,} bytes, written by openneutron {_version("openneutron")}.'

    def _array(self, stem: str, symbol: str, macro: str, data: bytes, *, default: str | None = None) -> tuple[str, str]:
        is_assembler = uses_assembler(self.array, len(data))
        file = "test_vectors.bin" if stem == "test_vectors" else f"{stem}.pte"
        source = f"{stem}.S" if is_assembler else f"{stem}.c"
        header = f"{stem}.h" if stem in (self.name, "test_vectors") else None
        return source, array_source(
            data, symbol, macro, self._title(), default=default, file=file if is_assembler else None, header=header
        )

    def _model_header(self, source: str) -> str:
        options = _options(self.method)
        return filled(
            "model.h",
            title=self._title(),
            NAME=self.name.upper(),
            name=self.name,
            source=source,
            bytes=len(self.program),
            crc32=f"0x{zlib.crc32(self.program):08X}",
            sha256=hashlib.sha256(self.program).hexdigest(),
            executorch=_version("executorch"),
            openneutron=_version("openneutron"),
            target=options.target if options else "",
            converter=(options.neutron_converter_flavor or "") if options else "",
            payload=self.kind,
        )

    def _main(self, rank: int) -> str:
        upper = self.name.upper()
        numbers = range(len(self.pools.planned))
        given = [(i, port) for i, port in enumerate(self.outputs) if port.dtype is not None and not port.is_planned]
        arrays = [f"POOL planned_{i}[{upper}_PLANNED_{i}_BYTES];" for i in numbers]
        arrays += [f"POOL output_{i}[{upper}_OUTPUT_{i}_BYTES];" for i, _ in given]
        kept = {i for i, port in enumerate(self.inputs) if port.bytes and not port.is_planned}
        arrays += [f"POOL input_{i}[{upper}_INPUT_{i}_BYTES];" for i in sorted(kept)]
        spans = ", ".join(f"{{planned_{i}, sizeof planned_{i}}}" for i in numbers)
        memory = f"  et::Span<uint8_t> planned[] = {{{spans}}};\n" if spans else ""
        argument = "planned" if spans else "et::Span<et::Span<uint8_t>>()"
        memory += f"  et::HierarchicalAllocator planned_memory({argument});"
        checks = [
            f"  if (meta->memory_planned_buffer_size({i}).get() > static_cast<int64_t>(sizeof planned_{i})) {{\n"
            f'    return too_small("{upper}_PLANNED_{i}_BYTES", sizeof planned_{i});\n  }}'
            for i in numbers
        ]
        outputs = [
            f"  if (method->set_output_data_ptr(output_{i}, sizeof output_{i}, {i}) != et::Error::Ok) {{\n"
            f'    return too_small("{upper}_OUTPUT_{i}_BYTES", sizeof output_{i});\n  }}'
            for i, _ in given
        ]
        return filled(
            "main.cpp",
            name=self.name,
            NAME=upper,
            rank=rank,
            planned_pools="".join(f"{line}\n" for line in arrays),
            input_memory=", ".join(f"input_{i}" if i in kept else "nullptr" for i in range(len(self.inputs))),
            planned_memory=memory,
            planned_checks="\n".join(checks),
            given_outputs="\n".join(outputs),
        )

    def _cmake(self, sources: list[str]) -> str:
        portable = "" if self.portable is None else f"{self.name.upper()}_PORTABLE_BYTES={len(self.portable)} "
        return filled(
            "CMakeLists.txt",
            name=self.name,
            asm=" ASM" if any(source.endswith(".S") for source in sources) else "",
            sources=" ".join(sources),
            executorch_minor=_EXECUTORCH,
            definitions=portable,
        )

    def readme(self, files: Iterable[str]) -> str:
        """Returns the text of README.md. `files` are the names of all files."""
        pools = self.pools
        names = tuple(files)
        arrays = [file for stem in (self.name, "test_vectors") for file in (f"{stem}.c", f"{stem}.S") if file in names]
        arrays += [file for file in names if file == "kernel_selection.c"]
        is_runnable = self.kind != DEVICE or self.portable is not None
        estimated = ", with an estimate of the NPU's scratch" if pools.scratch_is_estimated else ""
        return filled(
            "README.md",
            name=self.name,
            NAME=self.name.upper(),
            delegates=self._delegates(),
            files=table_of_files(
                self.name, names, vectors=len(self.vectors.inputs), io=io_contents(self.inputs, self.outputs)
            ),
            bytes=f"{len(self.program):,}",
            sources=" ".join(arrays),
            planned=f"{sum(pools.planned):,}",
            method=_bytes_of_pool(pools.method[1], (*_driver_contexts(pools), *pools.unknown_method)),
            temporary=_bytes_of_pool(pools.temporary[1], pools.unknown_temporary) + estimated,
            validate=_VALIDATE if is_runnable else "",
            tolerance=f"{self.tolerance:g}",
            compile=filled("compile.md", name=self.name) if self.kind == PORTABLE else "",
        )


def _driver_contexts(pools: PoolSizes) -> tuple[str, ...]:
    return ("the driver's contexts",) if pools.delegates else ()


def _bytes_of_pool(size: int, unknown: Sequence[str]) -> str:
    return f"{size:,}" + (f", and of unknown size: {', '.join(unknown)}" if unknown else "")


def _method(program: bytes) -> pte.Method:
    """Returns the method `forward`."""
    identifier = bytes(program[4:8])
    if identifier[:2] == b"ET" and identifier not in pte.FILE_IDENTIFIERS:
        raise FormatError(
            f"The program is for another version of ExecuTorch's runtime ('{identifier.decode(errors='replace')}', not "
            f"'{pte.FILE_IDENTIFIERS[0].decode()}'). Lower the model again with executorch {_EXECUTORCH}."
        )
    found = [method for method in pte.read(program).methods if method.name == METHOD]
    if not found:
        raise FormatError(f"The program has no method '{METHOD}'. Package a program that lower() wrote.")
    check_delegate_outputs(found[0], "The program")
    return found[0]


def _kind(method: pte.Method) -> int:
    payloads = [parse(call.payload) for call in method.delegates if call.backend == BACKEND]
    if not payloads:
        return NO_DELEGATE
    return PORTABLE if any(payload.is_portable for payload in payloads) else DEVICE


def _options(method: pte.Method) -> CompileOptions | None:
    specs = [call.compile_specs for call in method.delegates if call.backend == BACKEND]
    return CompileOptions.from_values(specs[0]) if specs else None


def _runs_on_host(program: bytes, kind: int, portable: bytes | None, vectors: object) -> tuple[bytes, bool]:
    """Returns the program that describes inputs and outputs, and whether the host can run it."""
    if kind != DEVICE:
        return program, True
    if portable is not None:
        if _kind(_method(portable)) == DEVICE:
            raise InputError("The portable program contains microcode. Give the program from before its compilation.")
        if _interface(_method(portable)) != _interface(_method(program)):
            raise InputError(
                "The portable program is not the one from which the device program was compiled: their inputs, outputs "
                "or memory differ."
            )
        return portable, True
    if isinstance(vectors, int):
        raise InputError(
            "This is a device program, which this machine cannot run, so its test vectors are unknown. Give the "
            "portable program that it was compiled from (--portable), or a .npz file of test vectors (--vectors)."
        )
    return program, False


def _interface(method: pte.Method) -> str:
    """Returns a text that is equal for a portable program and the device program that is compiled from it."""
    return repr((method.inputs, method.outputs, method.planned_bytes))  # NaN does not equal itself, but its text does


def _manifest(made: _Files, files: Mapping[str, bytes], recipe: Mapping[str, Any] | None) -> bytes:
    options = _options(made.method)
    content = {
        "name": made.name,
        "payload": _KINDS[made.kind],
        "target": None if options is None else options.target,
        "converter_flavor": None if options is None else options.neutron_converter_flavor,
        "program": {"bytes": len(made.program), "sha256": hashlib.sha256(made.program).hexdigest()},
        "versions": {one: _version(one) for one in _DEPENDENCIES},
        "schema": pte.FILE_IDENTIFIERS[0].decode(),
        "recipe": recipe,
        "vectors": len(made.vectors.inputs),
        "tolerance_lsb": made.tolerance,
        "inputs": [_described(port) for port in made.inputs],
        "outputs": [_described(port) for port in made.outputs],
        "files": {file: hashlib.sha256(data).hexdigest() for file, data in sorted(files.items())},
    }
    return json.dumps(without_infinite_numbers(content), indent=2, default=str, allow_nan=False).encode() + b"\n"


def _described(port: Port) -> dict[str, Any]:
    if port.dtype is None:
        return {"name": port.name, "constant": port.constant}
    return {
        "name": port.name,
        "dtype": port.dtype,
        "shape": port.shape,
        "dim_order": port.dim_order,
        "scale": port.scale,
        "zero_point": port.zero_point,
        "bytes": port.bytes,
    }


def _python() -> bytes:
    """Returns the text of `python.cmake`, which names the Python that writes the package."""
    path = Path(sys.executable).as_posix()
    return (
        "# The Python that wrote this package. Without this file, CMake searches for one.\n"
        f'if(EXISTS "{path}")\n  set(Python_EXECUTABLE "{path}")\nendif()\n'
    ).encode()


def _version(name: str) -> str:
    if name == "openneutron":
        return __version__
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"

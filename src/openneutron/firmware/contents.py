"""Describes the files of a package in a table, for its README.md."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["table_of_files"]

_CONTENTS = {
    "{name}.h": "size, hash and versions of the program; declares its array",
    "{name}.c": "the program as a constant array",
    "{name}.S": "the program as a constant array, assembler source that includes `{name}.pte`",
    "{name}.pte": "the program",
    "{name}_portable.c": "the portable program as an array, which the test on a host runs",
    "{name}_portable.S": "the portable program as an array (assembler source), which the test on a host runs",
    "{name}_portable.pte": "the portable program, from which the program was compiled",
    "{name}_config.h": "sizes of the memory pools; shape, dtype, scale and zero point of inputs and outputs",
    "{name}_io.h": "{io}",
    "kernels.cmake": "the CPU kernels to link, for ExecuTorch's selective build",
    "kernels.yaml": "the same kernels with dtypes and dim orders, in the format of ExecuTorch's tools",
    "kernel_selection.c": "the NPU kernels to link, written by NXP's converter",
    "main.cpp": "a test: runs the program on the test vectors and compares the outputs with those of the host",
    "profile_tracer.h": "prints the times of the NPU's kernels, for `{upper}_PRINT_PROFILE`",
    "test_vectors.h": "{vectors} test vectors: dtypes, shapes and offsets of inputs and outputs, and the tolerance",
    "test_vectors.c": "the bytes of the test vectors as a constant array",
    "test_vectors.S": "the bytes of the test vectors as a constant array, assembler source that includes the .bin file",
    "test_vectors.bin": "the bytes of the test vectors",
    "{name}.bpte": "the same program and vectors as ExecuTorch's bundled program, for its runners",
    "etrecord.bin": "ExecuTorch's ETRecord, for its Inspector",
    "CMakeLists.txt": "the test on a host",
    "host_backend.h": "declares the NPU's stand-in on a host",
    "host_backend.cpp": "the NPU's stand-in on a host: LiteRT runs the delegates",
    "python.cmake": "the Python that wrote this package",
    "manifest.json": "versions, options and hashes",
    "README.md": "this file",
}


def table_of_files(name: str, files: Iterable[str], *, vectors: int, io: str) -> str:
    """Returns the rows of the table, one for each file. `io` says what the functions of {name}_io.h do.

    Raises `KeyError` for a file that is not described.
    """
    values = {"name": name, "upper": name.upper(), "vectors": vectors, "io": io}
    contents = {file.format(**values): text.format(**values) for file, text in _CONTENTS.items()}
    order = {file: number for number, file in enumerate(contents)}
    return "\n".join(f"| `{file}` | {contents[file]} |" for file in sorted(files, key=order.__getitem__))

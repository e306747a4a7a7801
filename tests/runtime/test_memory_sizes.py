"""Sizes of ExecuTorch's classes, from which the memory of a method is computed, against its headers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import executorch
import pytest

from openneutron.formats.method_memory import ARM32, HOST64

INCLUDE = Path(executorch.__path__[0]) / "include"
PREAMBLE = """
#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/core/evalue.h>
#include <executorch/runtime/core/portable_type/tensor_impl.h>
#include <executorch/runtime/executor/method.h>
#include <executorch/runtime/kernel/operator_registry.h>
#include <optional>
namespace et = executorch::runtime;
using namespace executorch::aten;
// Declared in sources of ExecuTorch that its package lacks: runtime/executor/method.cpp, tensor_parser.h, and
// backends/nxp/runtime/NeutronBackend.cpp with EXTERNAL_MEM. Only the types and the order of the members matter.
struct BackendDelegate { et::FreeableBuffer segment; const void* backend; void* handle; };
struct Chain { const void* chain; et::Span<et::InstructionArgs> arguments; et::OpFunction* kernels; };
struct NamedData { const char* key; et::FreeableBuffer buffer; };
struct NeutronConfig {
  int counts[3]; uint32_t sizes[4]; const void* blocks[3]; uint32_t timeout; void* data[4]; void* model;
  const uint8_t* maps[4];
};
"""
CLASSES = {
    "bool": "bool", "uint8": "DimOrderType", "int32": "StridesType", "int64": "int64_t", "EValue": "et::EValue",
    "pointer": "et::EValue*", "TensorImpl": "TensorImpl", "Tensor": "Tensor", "optional<Tensor>":
    "std::optional<Tensor>", "BoxedEvalueList": "et::BoxedEvalueList<int64_t>", "ArrayRef": "ArrayRef<double>",
    "InstructionArgs": "et::InstructionArgs", "OpFunction": "et::OpFunction", "Chain": "Chain",
    "BackendDelegate": "BackendDelegate", "CompileSpec": "et::CompileSpec", "TensorMeta": "et::TensorMeta",
    "NamedData": "NamedData", "NeutronExecutorchConfig": "NeutronConfig",
}  # fmt: skip
COMPILERS = {
    "this machine": (["c++"], HOST64),
    "Cortex-M33": (["arm-none-eabi-g++", "-mcpu=cortex-m33", "-mthumb"], ARM32),
}


def compiles(command: list[str], sizes: dict[str, tuple[int, int]], folder: Path) -> str:
    """Returns the compiler's errors; empty if all sizes and alignments are right."""
    asserts = [
        f'static_assert(sizeof({CLASSES[name]}) == {size} && alignof({CLASSES[name]}) == {alignment}, "{name}");'
        for name, (size, alignment) in sizes.items()
    ]
    source = folder / "sizes.cpp"
    source.write_text(PREAMBLE + "\n".join(asserts))
    includes = ["-I", str(INCLUDE), "-I", str(INCLUDE / "executorch/runtime/core/portable_type/c10")]
    flags = ["-std=c++17", "-w", "-fsyntax-only", "-DC10_USING_CUSTOM_GENERATED_MACROS"]
    result = subprocess.run([*command, *flags, *includes, str(source)], capture_output=True, text=True, check=False)
    return result.stderr


def preprocessed(command: list[str], source: str) -> str | None:
    """Returns the preprocessed C++ source; None if a header is missing."""
    command = [*command, "-E", "-x", "c++", "-"]
    result = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    return result.stdout if result.returncode == 0 else None


@pytest.mark.parametrize("name", COMPILERS)
def test_sizes_of_classes_equal_the_headers(name: str, tmp_path: Path) -> None:
    command, abi = COMPILERS[name]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    if preprocessed(command, "#include <optional>\n") is None:
        pytest.skip(f"{command[0]} has no C++ headers (Debian: libstdc++-arm-none-eabi-newlib)")
    sizes = dict(abi.sizes)
    assert compiles(command, sizes, tmp_path) == ""
    wrong = compiles(command, {**sizes, "TensorImpl": (sizes["TensorImpl"][0] + 4, 4)}, tmp_path)
    assert "TensorImpl" in wrong
    assert "EValue" not in wrong.split("TensorImpl")[0]

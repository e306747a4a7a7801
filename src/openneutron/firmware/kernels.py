"""Lists the CPU kernels that a program calls, in the format of ExecuTorch's selective build."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from openneutron.firmware.templates import filled
from openneutron.formats import pte

__all__ = ["kernels_cmake", "kernels_yaml", "operators_of"]

_KEY_VERSION = "v1"
_TENSOR_KINDS = (5, 10, 11)  # a tensor, and lists of tensors, in the union KernelTypes of ExecuTorch's schema


def operators_of(method: pte.Method) -> tuple[str, ...]:
    """Returns the names of the operators that a method calls outside delegates, sorted."""
    return tuple(sorted({call.name for call in method.calls if isinstance(call, pte.KernelCall)}))


def kernels_cmake(name: str, operators: tuple[str, ...]) -> str:
    """Returns the text of `kernels.cmake`."""
    if not operators:
        text = f'# The program "{name}" calls no CPU kernels: the delegates compute everything.'
        return f"{text}\nadd_library({name}_kernels INTERFACE)\n"
    names = "\n".join(f'  "{one}"' for one in operators)
    return filled("kernels.cmake", name=name, NAME=name.upper(), operators=f"{names})")


def kernels_yaml(data: bytes, operators: tuple[str, ...]) -> str:
    """Returns the text of `kernels.yaml`, the file `selected_operators.yaml` of ExecuTorch's selective build.

    For each operator, `et_kernel_metadata` lists keys: the dtype and the dim order of each tensor argument
    (runtime/kernel/operator_registry.h of ExecuTorch).
    """
    keys = _kernel_keys(data)
    lines = ["build_features: []", "custom_classes: []"]
    lines += ["et_kernel_metadata:" if operators else "et_kernel_metadata: {}"]
    for one in operators:
        lines += [f"  {one}:", *(f"  - {key}" for key in keys.get(one, ["default"]))]
    lines += ["include_all_non_op_selectives: false", "include_all_operators: false", "kernel_metadata: {}"]
    lines += ["operators:" if operators else "operators: {}"]
    for one in operators:
        lines += [
            f"  {one}:",
            "    debug_info:",
            "    - model.pte",
            "    include_all_overloads: false",
            "    is_root_operator: true",
            "    is_used_for_training: true",
        ]
    return "\n".join(lines) + "\n"


def _kernel_keys(data: bytes) -> Mapping[str, list[str]]:
    """Returns the keys of the kernels of each operator, sorted."""
    from executorch.codegen.tools import selective_build  # an extension module of ExecuTorch's wheel

    program = selective_build._get_program_from_buffer(data)
    found = selective_build._get_io_metadata_for_program_operators(program)
    return {
        name: sorted({"/".join((_KEY_VERSION, "|".join(_tensors(one)))) for one in calls})
        for name, calls in found.items()
    }


def _tensors(call: object) -> Iterator[str]:
    """Returns the dtype and the dim order of each tensor argument of a call."""
    for argument in call:  # type: ignore[attr-defined]
        if argument.kernel_type in _TENSOR_KINDS:
            yield f"{argument.dtype};{','.join(map(str, argument.dim_order))}"

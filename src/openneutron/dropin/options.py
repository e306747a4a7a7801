"""Options of ExecuTorch's NXP backend, with its names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from executorch.exir.backend.compile_spec_schema import CompileSpec

from openneutron.compile_spec import generate_neutron_compile_spec
from openneutron.errors import OptionError

__all__ = ["CustomDelegationOptions", "NeutronCompileSpecBuilder", "core_aten_ops_exception_list"]

core_aten_ops_exception_list = [torch.ops.aten.prelu.default]
"""Operators of the edge program that are not in core ATen.

`EdgeCompileConfig(_core_aten_ops_exception_list=...)` takes this list.
"""


@dataclass
class CustomDelegationOptions:
    """`NeutronPartitioner` accepts these options and ignores them.

    OpenNeutron makes no partitions that only move values, because they cost more than they save.
    """

    allow_no_op_partitions: bool = False


class NeutronCompileSpecBuilder:
    """Builds the compile specs of `generate_neutron_compile_spec`.

    Usage: `NeutronCompileSpecBuilder().neutron_compile_spec(...).build()`.
    """

    def __init__(self) -> None:
        self._specs: list[CompileSpec] = []

    def neutron_compile_spec(self, config: str, *arguments: Any, **options: Any) -> NeutronCompileSpecBuilder:
        """Sets all options. Arguments and errors are those of `generate_neutron_compile_spec`."""
        self._specs = generate_neutron_compile_spec(config, *arguments, **options)
        return self

    def build(self) -> list[CompileSpec]:
        """Returns the compile specs. Raises `OptionError` if `neutron_compile_spec` was not called before."""
        if not self._specs:
            raise OptionError("Call neutron_compile_spec(...) on the builder before build(), to set the target.")
        return self._specs

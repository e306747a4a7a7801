"""Options of ExecuTorch's NXP backend by the names that scripts for it use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from executorch.exir.backend.compile_spec_schema import CompileSpec

from openneutron.compile_spec import generate_neutron_compile_spec
from openneutron.errors import OptionError

__all__ = ["CustomDelegationOptions", "NeutronCompileSpecBuilder", "core_aten_ops_exception_list"]

core_aten_ops_exception_list = [torch.ops.aten.prelu.default]
"""ATen operators that the edge program may have: for `EdgeCompileConfig(_core_aten_ops_exception_list=...)`."""


@dataclass
class CustomDelegationOptions:
    """Accepted by `NeutronPartitioner`, without effect.

    OpenNeutron makes no partition that only moves values, as it would cost more than it saves.
    """

    allow_no_op_partitions: bool = False


class NeutronCompileSpecBuilder:
    """Builds what `generate_neutron_compile_spec` returns: `NeutronCompileSpecBuilder().neutron_compile_spec(...)`."""

    def __init__(self) -> None:
        self._specs: list[CompileSpec] = []

    def neutron_compile_spec(self, config: str, *arguments: Any, **options: Any) -> NeutronCompileSpecBuilder:
        """Set all options; those of `generate_neutron_compile_spec`. Raises `TargetError` and `OptionError`."""
        self._specs = generate_neutron_compile_spec(config, *arguments, **options)
        return self

    def build(self) -> list[CompileSpec]:
        """The compile specs. Raises `OptionError` before `neutron_compile_spec` was called."""
        if not self._specs:
            raise OptionError("Call neutron_compile_spec(...) of the builder before build(): it names the target.")
        return self._specs

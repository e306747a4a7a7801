"""Converts PyTorch models to int8 ExecuTorch programs for NXP's eIQ Neutron NPU, and runs them on the host.

Only device programs need NXP's converter. The short flow:

    quantized = openneutron.quantize(model.eval(), example_inputs, calibration)
    program = openneutron.lower(quantized, target="imxrt700")
    program.save("model.pte")
    outputs = program.run(*example_inputs)

The package imports a public name on its first use, so `import openneutron` imports neither torch nor ExecuTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from openneutron.version import __version__ as __version__

if TYPE_CHECKING:
    from openneutron.accuracy.validate import validate as validate
    from openneutron.compile_spec import CompileOptions as CompileOptions
    from openneutron.compile_spec import generate_neutron_compile_spec as generate_neutron_compile_spec
    from openneutron.documented_flow import NeutronQuantizer as NeutronQuantizer
    from openneutron.flow import lower as lower
    from openneutron.flow import quantize as quantize
    from openneutron.model.state import Stream as Stream
    from openneutron.model.state import keep_assignments as keep_assignments
    from openneutron.model.state import reset as reset
    from openneutron.neutron_program import NeutronProgram as NeutronProgram
    from openneutron.partition.backend import NeutronBackend as NeutronBackend
    from openneutron.partition.partitioner import NeutronPartitioner as NeutronPartitioner
    from openneutron.partition.placing import Placement as Placement
    from openneutron.partition.placing import placement as placement
    from openneutron.partition.quantized_io import int8_io as int8_io
    from openneutron.quantized_model import QuantizedModel as QuantizedModel
    from openneutron.report.inspect import inspect as inspect
    from openneutron.runtime import load as load
    from openneutron.settings import Settings as Settings
    from openneutron.settings import read_settings as read_settings
    from openneutron.targets import NeutronTargetSpec as NeutronTargetSpec
    from openneutron.training_flow import distill as distill
    from openneutron.training_flow import finish_training as finish_training
    from openneutron.training_flow import prepare_training as prepare_training
    from openneutron.workflow import Build as Build
    from openneutron.workflow import build as build
    from openneutron.workflow import build_from_settings as build_from_settings
    from openneutron.workflow import try_changes as try_changes

_HOMES = {
    "Build": "workflow",
    "CompileOptions": "compile_spec",
    "NeutronBackend": "partition.backend",
    "NeutronPartitioner": "partition.partitioner",
    "NeutronProgram": "neutron_program",
    "NeutronQuantizer": "documented_flow",
    "NeutronTargetSpec": "targets",
    "Placement": "partition.placing",
    "QuantizedModel": "quantized_model",
    "Settings": "settings",
    "Stream": "model.state",
    "build": "workflow",
    "build_from_settings": "workflow",
    "distill": "training_flow",
    "finish_training": "training_flow",
    "generate_neutron_compile_spec": "compile_spec",
    "inspect": "report.inspect",
    "int8_io": "partition.quantized_io",
    "keep_assignments": "model.state",
    "load": "runtime",
    "lower": "flow",
    "placement": "partition.placing",
    "prepare_training": "training_flow",
    "quantize": "flow",
    "read_settings": "settings",
    "reset": "model.state",
    "try_changes": "workflow",
    "validate": "accuracy.validate",
}

__all__ = [*sorted(_HOMES)]  # noqa: PLE0604


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'openneutron' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"openneutron.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

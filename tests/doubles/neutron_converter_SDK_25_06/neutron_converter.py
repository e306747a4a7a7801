"""The same converter as in `eiq_neutron_sdk`."""

from eiq_neutron_sdk.neutron_converter import CompilationContext, convertModel, getNeutronTarget

__all__ = ["CompilationContext", "convertModel", "getNeutronTarget"]

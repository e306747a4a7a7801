"""The same converter as in the newer package."""

from eiq_neutron_sdk.neutron_converter import CompilationContext, convertModel, getNeutronTarget

__all__ = ["CompilationContext", "convertModel", "getNeutronTarget"]

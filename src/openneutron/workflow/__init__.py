"""The whole way from a float model to a program and its report."""

from openneutron.workflow.building import Build, build
from openneutron.workflow.from_settings import build_from_settings

__all__ = ["Build", "build", "build_from_settings"]

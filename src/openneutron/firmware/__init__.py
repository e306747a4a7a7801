"""Packages of programs for firmware: sources, memory, test vectors, and a test that builds on this machine."""

from openneutron.firmware.options import PackageOptions
from openneutron.firmware.packaging import Package, package

__all__ = ["Package", "PackageOptions", "package"]

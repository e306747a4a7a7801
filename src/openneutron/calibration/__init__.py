"""Calibration: what data it takes, and how the observers of a prepared model see them."""

from __future__ import annotations

from openneutron.calibration.data import collect, described, forward_names
from openneutron.calibration.run import CalibrationOptions, calibrate

__all__ = ["CalibrationOptions", "calibrate", "collect", "described", "forward_names"]

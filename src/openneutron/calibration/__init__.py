"""Runs a prepared model on calibration data, so that its observers record ranges."""

from __future__ import annotations

from openneutron.calibration.run import CalibrationOptions, calibrate

__all__ = ["CalibrationOptions", "calibrate"]

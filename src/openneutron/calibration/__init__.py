"""Calibration: how the observers of a prepared model see them."""

from __future__ import annotations

from openneutron.calibration.run import CalibrationOptions, calibrate

__all__ = ["CalibrationOptions", "calibrate"]

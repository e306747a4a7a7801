"""Measures the accuracy of a quantized model, finds the layers that lose accuracy, and suggests remedies."""

from openneutron.accuracy.analyze import Analysis, LayerAccuracy, analyze
from openneutron.accuracy.evaluate import evaluate
from openneutron.accuracy.validate import Validation, validate

__all__ = ["Analysis", "LayerAccuracy", "Validation", "analyze", "evaluate", "validate"]

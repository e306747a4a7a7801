"""Measures the accuracy of a quantized model, finds the layers that lose accuracy, and suggests remedies."""

from openneutron.accuracy.analyze import Analysis, LayerAccuracy, analyze
from openneutron.accuracy.evaluate import evaluate

__all__ = ["Analysis", "LayerAccuracy", "analyze", "evaluate"]

"""How good a quantized model is, where it loses accuracy, and how to get it back."""

from openneutron.accuracy.analyze import Analysis, LayerAccuracy, analyze
from openneutron.accuracy.evaluate import evaluate

__all__ = ["Analysis", "LayerAccuracy", "analyze", "evaluate"]

"""How good a quantized model is."""

from openneutron.accuracy.evaluate import evaluate

__all__ = ["evaluate"]

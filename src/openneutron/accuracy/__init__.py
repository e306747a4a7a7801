"""What quantization costs in accuracy, where it is lost, and what to do about it."""

from openneutron.accuracy.analyze import Analysis, LayerAccuracy, analyze

__all__ = ["Analysis", "LayerAccuracy", "analyze"]

"""Measures the accuracy of a quantized model, finds the layers that lose accuracy, and suggests remedies."""

from openneutron.accuracy.analyze import analyze
from openneutron.accuracy.board_outputs import BoardValidation, validate_board
from openneutron.accuracy.evaluate import evaluate, evaluate_side_by_side
from openneutron.accuracy.result import Analysis
from openneutron.accuracy.validate import validate
from openneutron.results.layerwise_accuracy import LayerAccuracy
from openneutron.results.side_by_side import ChangedSample, RunScores, SideBySide
from openneutron.results.validation import Validation

__all__ = [
    "Analysis", "BoardValidation", "ChangedSample", "LayerAccuracy", "RunScores", "SideBySide", "Validation",
    "analyze", "evaluate", "evaluate_side_by_side", "validate", "validate_board",
]  # fmt: skip

"""Data of users: readers of files, folders and functions, and transforms. Importing it does not import torch."""

from openneutron.data.audio import AudioTransform, Waveform
from openneutron.data.files import SkippedFilesWarning
from openneutron.data.images import ImageTransform, thumbnail
from openneutron.data.inputs import FileInputs, inputs_of_files
from openneutron.data.labels import ClassNames, read_labels
from openneutron.data.outputs import ClassScore, OutputSummary, save_outputs, summarize_outputs, top_classes
from openneutron.data.samples import Samples, check_data, read_data
from openneutron.data.sources import Sample, read_value
from openneutron.data.transforms import transform_of

__all__ = [
    "AudioTransform", "ClassNames", "ClassScore", "FileInputs", "ImageTransform", "OutputSummary", "Sample", "Samples",
    "SkippedFilesWarning", "Waveform", "check_data", "inputs_of_files", "read_data", "read_labels", "read_value",
    "save_outputs", "summarize_outputs", "thumbnail", "top_classes", "transform_of",
]  # fmt: skip

"""Data of users: readers of files, folders and functions, and transforms. Importing it does not import torch."""

from openneutron.data.audio import AudioTransform, Waveform
from openneutron.data.files import SkippedFilesWarning
from openneutron.data.images import ImageTransform
from openneutron.data.labels import ClassNames, read_labels
from openneutron.data.samples import Samples, check_data, read_data
from openneutron.data.sources import Sample, read_value
from openneutron.data.transforms import transform_of

__all__ = [
    "AudioTransform", "ClassNames", "ImageTransform", "Sample", "Samples", "SkippedFilesWarning", "Waveform",
    "check_data", "read_data", "read_labels", "read_value", "transform_of",
]  # fmt: skip

"""The TFLite file format: the only room that knows flatbuffers."""

from openneutron.tflite.write import write

__all__ = ["write"]

"""The errors a user can meet. Each names the node, the operator and the user's source line where there is one."""

from __future__ import annotations

__all__ = [
    "CalibrationError",
    "ConverterError",
    "FormatError",
    "HostError",
    "InputError",
    "ModelError",
    "NativeModuleError",
    "OpenNeutronError",
    "OptionError",
    "OutputError",
    "PayloadError",
    "TargetError",
]


class OpenNeutronError(Exception):
    """Base of every error that OpenNeutron raises on purpose.

    `node` is the name of the graph node, `op` its operator, `source` the user's "file:line"; each is None where the
    error is not about one node.
    """

    def __init__(
        self, message: str, *, node: str | None = None, op: str | None = None, source: str | None = None
    ) -> None:
        self.node, self.op, self.source = node, op, source
        where = [f"node '{node}'"] if node else []
        where += [op] if op else []
        where += [f"at {source}"] if source else []
        super().__init__(f"{message} [{', '.join(where)}]" if where else message)


class ModelError(OpenNeutronError):
    """The model cannot be taken as it is: train mode, dynamic shapes, an unsupported dtype."""


class CalibrationError(OpenNeutronError):
    """Calibration never ran, or its data are not finite, or not of the model's shape and dtype."""


class InputError(OpenNeutronError, ValueError):
    """Inputs do not match what the model or the program takes."""


class OptionError(OpenNeutronError, ValueError):
    """An option is unknown or has a value it cannot take."""


class TargetError(OpenNeutronError, ValueError):
    """The target is unknown, or cannot do what was asked of it."""


class PayloadError(OpenNeutronError, ValueError):
    """Bytes that are no delegate payload, or a broken one; the message has the offset."""


class ConverterError(OpenNeutronError, RuntimeError):
    """The vendor's converter is not there, or failed; the message has what it printed."""


class FormatError(OpenNeutronError, ValueError):
    """A file that is not what it should be, or a broken one; the message has the offset."""


class HostError(OpenNeutronError, RuntimeError):
    """A program that cannot be loaded or run on this machine."""


class NativeModuleError(HostError):
    """OpenNeutron was installed without the native module that runs programs on this machine."""


class OutputError(OpenNeutronError, OSError):
    """A file that cannot be written."""

"""The errors that OpenNeutron raises. An error about a node names the node, its operator and the user's source line."""

from __future__ import annotations

__all__ = [
    "CalibrationError",
    "ConverterError",
    "FormatError",
    "HostError",
    "HostProcessError",
    "InputError",
    "ModelError",
    "NativeModuleError",
    "OpenNeutronError",
    "OptionError",
    "OutputError",
    "PayloadError",
    "PoolError",
    "TargetError",
]


class OpenNeutronError(Exception):
    """Base class of all errors of OpenNeutron.

    `node` is the name of the graph node, `op` its operator, `source` the user's "file:line". Each is None if unknown,
    or if the error is not about one node.
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
    """The model is not supported: it is in train mode, has dynamic shapes or an unsupported dtype, for example."""


class CalibrationError(OpenNeutronError):
    """Calibration did not run, or its data contain NaN or infinity or do not match the model's shapes and dtypes."""


class InputError(OpenNeutronError, ValueError):
    """Inputs do not match the model or the program in number, name, shape or dtype, or an index is out of range."""


class OptionError(OpenNeutronError, ValueError):
    """An option is unknown or has an invalid value."""


class TargetError(OpenNeutronError, ValueError):
    """The target is unknown, or does not support the requested option."""


class PayloadError(OpenNeutronError, ValueError):
    """Bytes are not a valid delegate payload. The message names the byte offset of the error."""


class ConverterError(OpenNeutronError, RuntimeError):
    """The vendor's converter is not installed, or failed. The message contains the converter's output."""


class FormatError(OpenNeutronError, ValueError):
    """A file is damaged or has another format than expected. The message names the byte offset of the error."""


class HostError(OpenNeutronError, RuntimeError):
    """A program cannot be loaded or run on this machine."""


class HostProcessError(HostError):
    """The process in which a program ran ended, for example with a segmentation fault. `reset` starts a new one."""


class NativeModuleError(HostError):
    """OpenNeutron was installed without the native module that runs programs on this machine."""


class PoolError(HostError):
    """A memory pool is too small for a program. The message names the pool and the allocation that does not fit."""


class OutputError(OpenNeutronError, OSError):
    """A file cannot be written."""

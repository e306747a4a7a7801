"""Runs a TFLite model in a separate process, because LiteRT aborts the process on some models."""

from __future__ import annotations

import subprocess
import sys

from openneutron.errors import HostError

__all__ = ["error_in_subprocess"]

SECONDS = 120
_CODE = (
    "import sys; from ai_edge_litert.interpreter import Interpreter; "
    "model = Interpreter(model_content=sys.stdin.buffer.read(), num_threads=1); "
    "model.allocate_tensors(); model.invoke()"
)


def error_in_subprocess(model: bytes) -> str | None:
    """Runs `model` on zeros in LiteRT. Returns LiteRT's message if that fails, else None. Takes a second or more.

    Raises `HostError` if the process cannot be started.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CODE], input=model, capture_output=True, timeout=SECONDS, check=False
        )
    except OSError as error:
        raise HostError(
            f"LiteRT cannot be tried in a process of its own: {error.strerror or error}. Free memory, processes or "
            "open files."
        ) from error
    except subprocess.TimeoutExpired:
        return f"it did not end within {SECONDS} s"
    if done.returncode == 0:
        return None
    last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
    return f"signal {-done.returncode}" if done.returncode < 0 else last[0]

"""The transform of data from settings. Imports neither the flow nor the analysis of accuracy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from openneutron.data import transform_of
from openneutron.settings import Settings
from openneutron.settings.checks import image_transform

__all__ = ["transform_from"]


def transform_from(settings: Settings) -> Callable[[Any], Any] | None:
    """Returns the transform of the data; None if the settings give none, so that the default transform is used."""
    return image_transform(settings) if settings.data.transform is None else transform_of(settings.data.transform)

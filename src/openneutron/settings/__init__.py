"""The settings of a build: their declaration, and the files `openneutron.toml` that hold them."""

from openneutron.settings.declaration import SECTIONS, Field, Settings, fields_of
from openneutron.settings.toml import read_settings, settings_text, template, write_settings

__all__ = ["SECTIONS", "Field", "Settings", "fields_of", "read_settings", "settings_text", "template", "write_settings"]

"""The hook of mkdocs (mkdocs.yml): adds the generated pages, and lists the packages of the Python reference."""

from __future__ import annotations

from typing import Any

from docs.generators.pages import PAGES, PYTHON_PACKAGES
from mkdocs.structure.files import File, Files

__all__ = ["on_config", "on_files"]


def on_config(config: Any) -> Any:
    """Fills the section "Python" of the navigation."""
    reference = next(part["Reference"] for part in config.nav if isinstance(part, dict) and "Reference" in part)
    section = next(part for part in reference if "Python" in part)
    section["Python"] = [{name: f"reference/python/{name}.md"} for name in PYTHON_PACKAGES]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of `PAGES`."""
    for path, text in PAGES.items():
        files.append(File.generated(config, path, content=text()))
    return files

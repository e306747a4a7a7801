"""The command line: `openneutron VERB`, or `python -m openneutron VERB`."""

from openneutron.cli.main import main

__all__ = ["main"]

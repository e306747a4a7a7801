"""Finds, runs, checks and profiles NXP's converter."""

__all__: tuple[str, ...] = ()

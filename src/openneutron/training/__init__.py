"""Trains a converted module: changes weights, biases and ranges, and keeps operators and limits of codes."""

__all__: list[str] = []

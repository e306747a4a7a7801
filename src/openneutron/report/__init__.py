"""Reports the contents of a file, and estimates the memory and time that its model needs on the board."""

__all__: tuple[str, ...] = ()

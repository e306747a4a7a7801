"""What a file holds, what its model will need on the board: as data, text and JSON."""

__all__: tuple[str, ...] = ()

"""Reads and writes flatbuffers, `.pte` files, TFLite files and delegate payloads."""

__all__: tuple[str, ...] = ()

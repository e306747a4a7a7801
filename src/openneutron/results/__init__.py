"""Results as data, which the rooms that compute them and the rooms that show them share."""

__all__: list[str] = []

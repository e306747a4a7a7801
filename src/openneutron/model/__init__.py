"""The user's inputs: models in every form, their arguments, example inputs, data and states."""

__all__: tuple[str, ...] = ()

"""How a labkit cache says that it does not do what a model asks of it."""

from __future__ import annotations

OWN_CACHE = "use transformers' own cache"
WITHOUT = "use wrap(cache) without the model"


class CannotHold(ValueError, AttributeError):
    """A labkit cache does not do what a model asks of it. An AttributeError, too, so that `hasattr` says no."""

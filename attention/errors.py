"""What can go wrong in the attention framework."""


class AttentionBackendError(Exception):
    """No attention backend of that name, or none that can run what is asked; the text is fit for a user."""


class AttentionInputError(ValueError):
    """A batch, tensor or mask that does not fit the layer, the cache or the backend; says the value and the limit."""

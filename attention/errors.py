"""What can go wrong when a backend is chosen."""


class AttentionBackendError(Exception):
    """No attention backend of that name, or none that can run what is asked; the text is fit for a user."""

"""What can go wrong between the ranks of a worker."""

from __future__ import annotations

from workers.errors import BatonError


class TensorParallelError(BatonError):
    """The ranks of a worker did not come together, or one of them was lost; the text names the rank where it can."""

"""What the `baton` command exits with, as shells have it."""

from __future__ import annotations

EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 2, 130, 141

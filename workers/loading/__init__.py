"""From checkpoint files to parameters."""

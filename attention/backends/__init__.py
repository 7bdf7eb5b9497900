"""The attention backends, one file each."""

"""Proving a link, for `baton doctor`."""

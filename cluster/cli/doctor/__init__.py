"""`baton doctor`."""

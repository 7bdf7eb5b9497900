"""Families of models, one file each: what config.json says, what a layer does, and where weights go."""

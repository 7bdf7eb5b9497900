"""The backends of AMD GPUs."""

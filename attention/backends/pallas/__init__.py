"""PALLAS: JAX kernels for TPUs."""

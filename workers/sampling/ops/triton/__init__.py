"""The kernels of `workers.sampling.ops`, in Triton."""

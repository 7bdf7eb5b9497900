"""The kernels of `workers.ops`, in Triton."""

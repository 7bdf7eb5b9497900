"""Attention kernels in Triton: for CUDA and ROCm, and on the CPU in Triton's interpreter."""

"""Attention kernels, one package per language they are written in."""

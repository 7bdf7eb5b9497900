"""Attention layers of particular kinds, each on top of any backend."""

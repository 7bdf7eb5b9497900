"""Loads that would leave something behind if anything could: memory, descriptors, blocks, entries in books."""

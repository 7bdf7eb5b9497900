"""TREE_ATTN: draft trees."""

"""Which blocks there are, who uses them and what is in them."""

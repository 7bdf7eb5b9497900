"""From logits to tokens on the device: a Triton kernel and a plain torch twin of each operation."""

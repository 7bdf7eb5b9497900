"""From scheduled rows to logits: inputs, graphs, the device's copy of the batch."""

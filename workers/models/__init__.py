"""Model configuration, weights and the decoder network."""

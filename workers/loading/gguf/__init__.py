"""GGUF files: what they hold, as a checkpoint in Hugging Face format would."""

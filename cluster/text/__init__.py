"""Text in, text out: tokenizer, chat template, incremental detokenisation, stop strings."""

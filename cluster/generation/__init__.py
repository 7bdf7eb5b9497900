"""Text in, text out: prompts made into token ids, tokens into text, and what is asked of an answer."""

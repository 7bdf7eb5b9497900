"""What may come next in an answer that has a form: grammars, compiled for a vocabulary, and where a text is in one."""

"""Conversations: messages and tools as clients send them, and answers taken apart into content, reasoning and calls."""

"""The handoff protocol: messages, the sending and the receiving side."""

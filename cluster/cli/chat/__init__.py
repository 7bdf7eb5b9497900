"""`baton chat`: a conversation in the terminal."""

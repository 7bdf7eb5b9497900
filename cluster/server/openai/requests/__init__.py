"""What clients send, checked field by field."""

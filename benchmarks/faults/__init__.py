"""What a fault does to a service: parts of it killed, frozen or cut off at chosen moments, under clients who check."""

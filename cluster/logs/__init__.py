"""How logs are written: as text or JSON, to which stream or file, and what they call their process."""

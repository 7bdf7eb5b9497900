"""What a checkpoint's config.json says, checked and in one form."""

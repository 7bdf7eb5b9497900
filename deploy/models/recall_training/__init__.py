"""Training of the models that ship with Baton: small ones that recall a number from a list."""

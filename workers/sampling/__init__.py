"""Choosing the next token: parameters, penalties, sampling, stop conditions."""

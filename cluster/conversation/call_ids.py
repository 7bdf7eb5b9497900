"""Names for calls."""

from __future__ import annotations

import secrets
import string


def openai_id() -> str:
    """As clients of OpenAI know them."""
    return f"call_{secrets.token_hex(12)}"


def mistral_id() -> str:
    """Nine letters and digits: the templates of Mistral's models refuse any other."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))

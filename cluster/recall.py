"""The models that come with Baton, and prompts for them whose answers are known: names, numbers, and a question."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

_TEXT = """
    abe ada adam aida alan alba alec alex alma amir amos anna anne anton arlo asa axel bela ben beth bill boris
    brad bruno carl carol cass chad cleo cole cora cyrus dale dana dave dean diana dora drew duke earl eden
    elise ella emil emma enzo eric ethan eva evan felix fern finn flo frank fred gabe gail gina glen greta gus
    hal hana hank
"""
NAMES = tuple(_TEXT.split())
"""Names that the models were trained on, more than fit in one list."""

_CHECKPOINTS = Path(__file__).parent / "checkpoints"

SHIPPED_MODELS = {name: (_CHECKPOINTS / name).resolve() for name in ("recall", "recall-mla")}
"""The checkpoints that are part of the package, by name; in a checkout links to deploy/models."""

SHIPPED_MODEL = SHIPPED_MODELS["recall"]
"""The one that is served when none is named."""

EXAMPLE = "ada 4127, bob 9083; bob?"
"""A prompt to try it with."""

MAX_ENTRIES = 64
_ENTRY_TOKENS, _FRAME_TOKENS = 7, 3
"""A name, a space, four digits and a comma; the beginning of the text, the name asked for and a question mark."""


@dataclass(frozen=True)
class RecallPrompt:
    """A prompt and its only right answer."""

    text: str
    answer: str
    num_tokens: int


def make_recall_prompt(rng: random.Random, num_tokens: int) -> RecallPrompt:
    """A list as long as fits in `num_tokens`, of 1 to 64 entries."""
    return recall_prompt(rng, min(MAX_ENTRIES, max(1, (num_tokens - _FRAME_TOKENS) // _ENTRY_TOKENS)))


def recall_prompt(rng: random.Random, entries: int) -> RecallPrompt:
    """A list of `entries` names with numbers, and a question about one of them."""
    names = rng.sample(NAMES, entries)
    numbers = [f"{rng.randrange(10_000):04d}" for _ in names]
    asked = rng.randrange(entries)
    listing = ", ".join(f"{name} {number}" for name, number in zip(names, numbers, strict=True))
    return RecallPrompt(f"{listing}; {names[asked]}?", numbers[asked], _FRAME_TOKENS + _ENTRY_TOKENS * entries)


def checkpoint_named(name: str | None) -> str:
    """Where the model is that goes by `name`: one that comes with Baton, a folder or a hub id; None: the default."""
    if name is None:
        return str(SHIPPED_MODEL)
    return str(SHIPPED_MODELS[name]) if name in SHIPPED_MODELS and not Path(name).exists() else name


def is_shipped(name: str | None) -> bool:
    """Whether the model that goes by `name` (None: the default) is one that comes with Baton."""
    return Path(checkpoint_named(name)).resolve() in SHIPPED_MODELS.values()

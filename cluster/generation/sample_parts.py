"""What comes of several samples together, told apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from workers.messages import TokenOutput


def by_sample(tokens: Sequence[TokenOutput]) -> Iterable[tuple[int, Sequence[TokenOutput]]]:
    """The tokens of each sample, in order."""
    if all(token.index == tokens[0].index for token in tokens):
        return [(tokens[0].index, tokens)] if tokens else []
    samples: dict[int, list[TokenOutput]] = {}
    for token in tokens:
        samples.setdefault(token.index, []).append(token)
    return samples.items()

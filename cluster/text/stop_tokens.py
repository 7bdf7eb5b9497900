"""The tokens that end a request's text beside the model's end-of-sequence tokens."""

from __future__ import annotations

from collections.abc import Mapping

from workers.errors import InvalidRequestError
from workers.sampling_params import SamplingParams


def stop_token_ids(sampling: SamplingParams, special: Mapping[str, int]) -> tuple[int, ...]:
    """The stop tokens that a request names, by number or as a stop string, each once.

    A stop string that is a special token stands for that token: it is in no text.

    Args:
        sampling: the request's.
        special: the ids of special tokens, by how they are spelled.

    Raises:
        InvalidRequestError: a stop string has a special token and more; no text ever does.
    """
    spelled = [special[stop] for stop in sampling.stop if stop in special]
    for stop in sampling.stop:
        inside = next((token for token in special if token in stop and stop not in special), None)
        if inside is not None:
            raise InvalidRequestError(
                f"the stop string {stop!r} has the special token {inside!r} and more: special tokens are in no text, "
                f"so it would never end one; give {inside!r} alone"
            )
    return tuple(dict.fromkeys([*sampling.stop_token_ids, *spelled]))

"""What a window of attention leaves to be kept of a sequence. Plain integers."""

from __future__ import annotations

from workers.kv_cache.block_pool import blocks_for


def first_needed_block(num_computed: int, window: int, block_size: int) -> int:
    """The place in the sequence of the first block that the next query sees.

    The query at position p sees `window` tokens, itself included: those from p - window + 1 on.

    Args:
        num_computed: tokens in the cache: the next query's position.
        window: tokens that a query sees.
        block_size: tokens in a block.
    """
    return max(0, num_computed - window + 1) // block_size


def most_sequence_blocks(num_tokens: int, window: int | None, in_flight: int, block_size: int) -> int:
    """The most blocks that a sequence holds at once until it has so many tokens.

    Args:
        num_tokens: of the sequence.
        window: tokens that a query sees; None: all.
        in_flight: the most tokens that steps in flight compute at once.
        block_size: tokens in a block.
    """
    whole = blocks_for(num_tokens, block_size)
    return whole if window is None else min(whole, most_window_blocks(window, in_flight, block_size))


def most_window_blocks(window: int, in_flight: int, block_size: int) -> int:
    """The most blocks that a sequence holds of which steps in flight compute at most so many tokens.

    The first of these tokens is a query that sees `window` - 1 tokens before it.
    """
    return blocks_across(window - 1 + in_flight, block_size)


def blocks_across(num_tokens: int, block_size: int) -> int:
    """The most blocks that so many tokens in a row touch, wherever the first one lies in its block."""
    return 0 if num_tokens < 1 else (num_tokens + block_size - 2) // block_size + 1

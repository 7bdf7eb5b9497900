"""Nobody empties the prefix cache that others use: simulations on plain integers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

from workers.kv_cache.kept_blocks import MAX_OWNERS
from workers.kv_cache.prefix_cache import PrefixCache

NUM_BLOCKS = 60
Hashes = list[bytes]


def prompt(owner: str, number: int, length: int) -> Hashes:
    return [f"{owner} {number} {place}".encode() for place in range(length)]


def serve(cache: PrefixCache, owner: str, hashes: Hashes) -> int:
    """A prompt comes, is computed and goes; returns how many of its blocks were found."""
    held, found = begin(cache, owner, hashes)
    cache.release(held)
    return found


def begin(cache: PrefixCache, owner: str, hashes: Hashes) -> tuple[list[int], int]:
    blocks, found = cache.allocate(hashes, len(hashes), owner)
    for block, content in zip(blocks[found:], hashes[found:], strict=True):
        cache.store(block, content)
    return blocks, found


def once(cache: PrefixCache, owner: str, number: int, rng: random.Random) -> None:
    """Prompts that are never repeated, of any length up to most of the cache."""
    serve(cache, owner, prompt(owner, number, rng.randint(1, 45)))


def twice(cache: PrefixCache, owner: str, number: int, rng: random.Random) -> None:
    """Each is repeated at once, so that it counts as what prompts share."""
    hashes = prompt(owner, number, rng.randint(1, 45))
    serve(cache, owner, hashes)
    serve(cache, owner, hashes)


def side_by_side(cache: PrefixCache, owner: str, number: int, rng: random.Random) -> None:
    """Several at a time, each begun twice: their blocks are in use together."""
    asked = [prompt(owner, 3 * number + i, rng.randint(1, 15)) for i in range(3)]
    held = [begin(cache, owner, hashes)[0] for hashes in [*asked, *asked]]
    for blocks in held:
        cache.release(blocks)


def slowly(cache: PrefixCache, owner: str, number: int, rng: random.Random) -> None:
    """It repeats a great many small ones in turn."""
    serve(cache, owner, prompt(owner, number % 80, 2))


ATTACKS = (once, twice, side_by_side, slowly)


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_one_client_repeats_no_other_one_takes(attack: Callable) -> None:
    """A client's working set that is no more than its part of the cache, whatever a stranger does besides."""
    cache, rng = PrefixCache(NUM_BLOCKS), random.Random(1)
    mine = prompt("ann", 0, 12)
    serve(cache, "ann", mine)
    serve(cache, "ann", mine)
    for number in range(300):
        attack(cache, "bob", number, rng)
        if number % 10 == 9:
            assert serve(cache, "ann", mine) == 12, number


@pytest.mark.parametrize("seed", range(5))
def test_nor_do_several_of_them_with_any_attack(seed: int) -> None:
    """Up to 45 blocks are in use at once; of the others ann has no more than one of four clients may."""
    cache, rng = PrefixCache(3 * NUM_BLOCKS), random.Random(seed)
    mine = prompt("ann", 0, 32)
    serve(cache, "ann", mine)
    serve(cache, "ann", mine)
    for number in range(400):
        rng.choice(ATTACKS)(cache, rng.choice(("bob", "eve", "mallory")), number, rng)
        if number % 20 == 19:
            assert serve(cache, "ann", mine) == 32, number


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_several_clients_share_goes_last_whoever_brought_it(attack: Callable) -> None:
    """Here the one who did is also the one who has most."""
    cache, rng = PrefixCache(NUM_BLOCKS), random.Random(2)
    shared = prompt("everybody", 0, 14)
    serve(cache, "bob", shared)
    serve(cache, "ann", shared)
    for number in range(200):
        attack(cache, "bob", number, rng)
        assert len(cache.find(shared)) == 14, number


def test_of_what_nobody_repeats_the_one_who_has_most_gives_first() -> None:
    cache, rng = PrefixCache(NUM_BLOCKS), random.Random(3)
    mine = prompt("ann", 0, 20)
    serve(cache, "ann", mine)
    for number in range(200):
        serve(cache, "bob", prompt("bob", number, rng.randint(1, 40)))
        assert len(cache.find(mine)) == 20, number


def test_a_client_alone_has_all_of_the_cache_and_what_is_needed_is_there() -> None:
    cache = PrefixCache(NUM_BLOCKS)
    mine = prompt("ann", 0, NUM_BLOCKS - 16)
    serve(cache, "ann", mine)
    assert serve(cache, "ann", mine) == len(mine)
    serve(cache, "bob", prompt("bob", 0, 16))
    assert len(cache.find(mine)) == len(mine), "there was room"
    assert cache.fits((), NUM_BLOCKS)
    cache.release(cache.take(NUM_BLOCKS, "bob"))
    assert cache.num_stored == 0


def test_where_two_compete_for_what_they_repeat_they_end_up_equal() -> None:
    cache = PrefixCache(NUM_BLOCKS)
    sets = {owner: [prompt(owner, number, 3) for number in range(20)] for owner in ("ann", "bob")}
    for _ in range(20):
        for owner, prompts in sets.items():
            for hashes in prompts:
                serve(cache, owner, hashes)
    held = cache.held_by_owners
    assert abs(held["ann"] - held["bob"]) <= 6, Counter(held)


def test_clients_are_told_apart_up_to_a_number() -> None:
    cache = PrefixCache(4 * MAX_OWNERS)
    for number in range(3 * MAX_OWNERS):
        serve(cache, f"client {number}", prompt("x", number, 1))
    assert len(cache.held_by_owners) == MAX_OWNERS + 1
    assert sum(cache.held_by_owners.values()) == 3 * MAX_OWNERS
    cache.release(cache.take(4 * MAX_OWNERS, "another"))
    assert not cache.held_by_owners

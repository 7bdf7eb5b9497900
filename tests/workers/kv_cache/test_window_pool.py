"""Promises of blocks are kept, whoever shares what with whom."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from workers.kv_cache.window_pool import WindowPool


@dataclass(eq=False)
class User:
    """Somebody with blocks; `promised` is the most that it may hold at once, 0: as many as are free."""

    promised: int
    blocks: list[int] = field(default_factory=list)


@pytest.mark.parametrize("seed", range(40))
def test_who_was_promised_blocks_always_gets_them(seed):
    rng = random.Random(seed)
    pool, users, stored = WindowPool(rng.randint(4, 10), first=1), [], 0
    for _ in range(400):
        action = rng.random()
        if action < 0.15 and (wanted := rng.randint(0, 4)) <= pool.num_free and len(users) < 6:
            if wanted:
                pool.promise(wanted)
            users.append(User(wanted))
        if not users:
            continue
        user = rng.choice(users)
        promised = user.promised > 0
        may_hold = len(user.blocks) < user.promised
        if action < 0.45 and (may_hold if promised else pool.num_free > 0):
            block = pool.take(1, promised=promised)[0]  # never refused to somebody with a promise
            user.blocks.append(block)
            if rng.random() < 0.8:
                pool.store(block, b"%d" % stored)
                stored += 1
        elif action < 0.7:  # shares what can be found
            found = [block for block in pool.stored_blocks.values() if block not in user.blocks]
            block = rng.choice(found) if found else None
            if block is not None and (may_hold if promised else pool.share_cost(block) <= pool.num_free):
                pool.share([block], promised=promised)
                user.blocks.append(block)
        elif action < 0.9 and user.blocks:
            pool.release([user.blocks.pop(rng.randrange(len(user.blocks)))], promised=promised)
        elif action < 0.95 and promised:
            pool.withdraw(user.promised, user.blocks)
            user.promised = 0
        elif action >= 0.95:
            if promised:
                pool.withdraw(user.promised, user.blocks)
            pool.release(user.blocks)
            users.remove(user)
        assert pool.num_free >= 0
        owed = sum(u.promised - len(u.blocks) for u in users if u.promised)
        held = {block for u in users for block in u.blocks}
        assert pool.num_free <= pool.num_blocks - len(held)
        assert owed <= 0 or pool.num_blocks > len(held)
    for user in users:
        if user.promised:
            pool.withdraw(user.promised, user.blocks)
        pool.release(user.blocks)
    assert pool.num_free == pool.num_blocks
    assert all(pool.share_cost(block) for block in range(pool.num_blocks)), "a promise is left"


def test_what_one_shares_with_somebody_without_a_promise_does_not_count_for_it():
    """When it gives the block back, the block is not free."""
    pool = WindowPool(3)
    (shared,) = pool.take(1)
    pool.store(shared, b"a")
    pool.promise(2)
    pool.share([shared], promised=True)
    assert pool.num_free == 0, "two are promised, and one is in use whatever becomes of the promise"
    pool.release([shared], promised=True)
    assert pool.num_free == 0
    pool.take(2, promised=True)
    with pytest.raises(ValueError, match="1 blocks asked for, 0 are free"):
        pool.promise(1)


def test_two_with_promises_count_a_block_once():
    pool = WindowPool(4)
    pool.promise(2)
    pool.promise(2)
    (shared,) = pool.take(1, promised=True)
    pool.store(shared, b"a")
    pool.share([shared], promised=True)
    assert pool.num_free == 0
    pool.withdraw(2, [shared])
    assert pool.num_free == 1, "one is held, two are promised, and the one held is not among them"

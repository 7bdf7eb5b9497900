"""Pools of unlike groups: who works with whom, and how each group grows and shrinks."""

from __future__ import annotations

import asyncio

import pytest

from cluster.gateway.engine import ServingEngine
from cluster.pools.gpu_budget import GpuBudget, Share
from cluster.pools.groups import PoolLimits
from fleet import Fleet, prompt
from workers.errors import CapacityError, ConfigError, InvalidRequestError

SMALL = {"block_size": 16, "num_blocks": 64}
LARGE = {"block_size": 32, "num_blocks": 32, "attention_backend": "TORCH_SDPA"}
ONE_EACH = {
    f"{role}.{group}": PoolLimits(1, minimum=0, drain_timeout_s=5.0)
    for role in ("prefill", "decode")
    for group in ("small", "large")
}


@pytest.fixture
async def mixed(make_fleet) -> Fleet:
    """Two groups in each pool, of which only those of one block size can work together, with room for two each."""
    pool = {"small": [SMALL] * 2, "large": [LARGE] * 2}
    return await make_fleet(pool, pool, limits=ONE_EACH)


def ready(fleet: Fleet) -> list[str]:
    return sorted(w.engine_id.split(".")[0] for w in fleet.engine.workers() if w.state == "ready")


async def until_ready(fleet: Fleet, *names: str) -> None:
    await fleet.until(
        lambda workers: ready(fleet) == sorted(names) and len(workers) == len(names),
    )


async def test_like_workers_work_together_and_unlike_ones_say_why_not(mixed, expected):
    assert ready(mixed) == ["decode-large-0", "decode-small-0", "prefill-large-0", "prefill-small-0"]
    assert {w.engine_id.split(".")[0]: w.group for w in mixed.engine.workers()}["decode-large-0"] == "large"
    requests = [mixed.start(prompt(20 + i, seed=i), 12) for i in range(12)]

    async def tokens(stream) -> list[int]:
        return [token.token_id async for chunk in stream for token in chunk.tokens]

    answers = await asyncio.gather(*map(tokens, requests))
    assert answers == [expected(prompt(20 + i, seed=i), 12) for i in range(12)]
    pairs = {
        tuple(worker.split("-")[1] for worker in (report.prefill_worker, report.decode_worker))
        for report in [await request.report() for request in requests]
    }
    assert pairs <= {("small", "small"), ("large", "large")}
    replica = next(m for m in mixed.engine.pools.replicas if m.handle.name == "prefill-small-0")
    barred = [*replica.unsupported_reasons.values()] + [
        why
        for m in mixed.engine.pools.replicas
        for peer, why in m.unsupported_reasons.items()
        if peer == replica.engine_id
    ]
    assert len(barred) == 1
    assert "block_size is" in barred[0]
    await mixed.until_idle()


async def test_each_group_grows_and_shrinks_by_itself(mixed, expected):
    targets = mixed.engine.scale({"decode.large": 2, "prefill.small": 2})
    assert [(t.key, t.target, t.min_replicas, t.max_replicas) for t in targets] == [
        ("prefill.small", 2, 0, 2),
        ("prefill.large", 1, 0, 2),
        ("decode.small", 1, 0, 2),
        ("decode.large", 2, 0, 2),
    ]
    everybody = ("decode-large-0", "decode-small-0", "prefill-large-0", "prefill-small-0")
    await until_ready(mixed, *everybody, "decode-large-1", "prefill-small-1")
    mixed.engine.scale({"decode.small": 0, "prefill.small": 0, "decode.large": 1})
    await mixed.until(lambda workers: [w.group for w in workers if w.state == "ready"] == ["large"] * 2)
    assert await mixed.run(prompt(30), 8) == expected(prompt(30), 8)
    await mixed.until_idle()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"decode": 2}, r"the decode pool has several groups: say which of decode\.small, decode\.large"),
        ({"decode.big": 1}, r"no pool 'decode\.big'; the pools are prefill\.small, prefill\.large, decode\.small, dec"),
        ({"decode.small": 3}, r"decode\.small is 3, it must be in \[0, 2\]"),
        ({"decode.small": 0, "decode.large": 0}, r"nobody would be left in the decode pool: one of decode\.small, dec"),
    ],
)
async def test_a_wrong_target_is_refused_and_nothing_changes(targets, message, mixed):
    with pytest.raises(InvalidRequestError, match=message):
        mixed.engine.scale(targets)
    assert [target.target for target in mixed.engine.scale({})] == [1, 1, 1, 1]


async def test_only_a_pool_that_nobody_needs_may_be_emptied(make_fleet, expected):
    none = {"prefill": PoolLimits(1, minimum=0), "decode": PoolLimits(1, minimum=0)}
    for disaggregation, refused in (("always", ("prefill", "decode")), ("auto", ("decode",))):
        fleet = await make_fleet(1, 1, limits=none, disaggregation=disaggregation)
        for role in refused:
            with pytest.raises(InvalidRequestError, match=f"nobody would be left in the {role} pool"):
                fleet.engine.scale({role: 0})
    fleet.engine.scale({"prefill": 0})
    await until_ready(fleet, "decode-0")
    assert await fleet.run(prompt(30), 8) == expected(prompt(30), 8)
    fleet.engine.scale({"prefill": 1})
    await until_ready(fleet, "decode-0", "prefill-0")
    await fleet.until_idle()


async def test_a_pool_of_one_named_group_is_meant_by_its_role(make_fleet):
    fleet = await make_fleet({"only": [SMALL] * 2}, 1, limits={"prefill.only": PoolLimits(1)})
    assert [(t.key, t.target) for t in fleet.engine.scale({"prefill": 2})] == [("prefill.only", 2), ("decode", 1)]
    with pytest.raises(InvalidRequestError, match=r"prefill\.only is given twice"):
        fleet.engine.scale({"prefill": 1, "prefill.only": 1})
    await until_ready(fleet, "decode-0", "prefill-only-0", "prefill-only-1")


async def test_where_no_pair_is_left_that_fits_requests_wait_for_those_that_come_back(mixed, expected):
    for name in ("decode-large-0", "prefill-small-0"):
        mixed.handle(name).crash("killed by the test")
        await mixed.until(lambda workers, name=name: (name, "starting") in {(w.engine_id, w.state) for w in workers})
    assert ready(mixed) == ["decode-small-0", "prefill-large-0"]
    mixed.engine.scale({"decode.small": 1})  # the books are told anew who is there
    waiting = [asyncio.ensure_future(mixed.run(prompt(20 + i, seed=i), 6)) for i in range(4)]
    with pytest.raises(CapacityError, match="no pair of workers can serve"):
        await mixed.run(prompt(1100), 6)
    assert await asyncio.gather(*waiting) == [expected(prompt(20 + i, seed=i), 6) for i in range(4)]
    await until_ready(mixed, "decode-large-0", "decode-small-0", "prefill-large-0", "prefill-small-0")
    await mixed.until_idle()


async def test_a_start_fails_only_if_no_pair_fits(make_fleet):
    with pytest.raises(ConfigError, match=r"no prefill worker can hand over to any decode worker: .*block_size"):
        await make_fleet({"small": [SMALL] * 2}, {"large": [LARGE] * 2})
    fleet = await make_fleet({"small": [SMALL]}, {"large": [LARGE], "small": [SMALL]})
    assert len(ready(fleet)) == 3


async def test_workers_for_which_no_gpu_is_left_are_refused(make_fleet, tiny_checkpoint):
    fleet = await make_fleet(1, 1)
    engine = ServingEngine(
        fleet.places["prefill"],
        fleet.places["decode"] * 4,
        max_queue=8,
        limits={"decode": PoolLimits(1)},
        gpus=GpuBudget(1.0, {"prefill": Share(1, 0.3333), "decode": Share(1, 0.3333)}),
    )
    assert [(t.role, t.max_replicas) for t in engine.scale({})] == [("prefill", 1), ("decode", 2)]
    assert engine.signals()["decode"].maximum == 2, "the autoscaler asks for no more"
    with pytest.raises(InvalidRequestError, match=r"3 × 0\.3333 for decode, the Ray cluster has 1"):
        engine.scale({"decode": 3})

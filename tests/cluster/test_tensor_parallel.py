"""Workers of two ranks on real parts: a Ray actor a rank, collectives between them, NIXL from rank to rank, gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from cluster.config.load import load_config
from cluster.launch import launch
from cluster.ray.worker import RayWorker
from rank_service import Running, prompts, serving
from workers.errors import ConfigError
from workers.sampling_params import SamplingParams

pytestmark = [pytest.mark.ray, pytest.mark.nixl, pytest.mark.timeout(360), pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tiny_checkpoint, tmp_path_factory) -> AsyncIterator[Running]:
    async with serving(tiny_checkpoint("llama"), tmp_path_factory.mktemp("logs")) as service:
        yield service


async def test_two_ranks_answer_as_one_does(running, reference_greedy):
    pool = prompts(8, seed=1)
    answers = await asyncio.gather(*(running.generate(prompt, 12) for prompt in pool))
    assert answers == [reference_greedy(running.checkpoint, prompt, 12) for prompt in pool]
    await running.until_idle()


async def test_a_worker_is_one_whatever_its_ranks(running):
    workers = await running.client.workers()
    assert [worker.engine_id.partition(".")[0] for worker in workers] == ["prefill-0", "decode-0"]
    assert [worker.device for worker in workers] == ["2 × cpu", "2 × cpu"]
    assert any("into 1 prefill workers of 2 ranks on cpu" in line for line in running.lines)
    assert any(line.startswith("decode-0 on 2 × cpu: ") and line.endswith(", on each") for line in running.lines)


async def test_cancelled_requests_give_their_blocks_back(running):
    for seed in range(4):
        stream = running.client.generate(
            token_ids=prompts(1, seed)[0], sampling=SamplingParams(max_tokens=800, ignore_eos=True)
        )
        for _ in range(seed):
            await anext(stream)
        await stream.aclose()
    await running.until_idle()


@pytest.mark.parametrize("harm", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
async def test_a_killed_or_frozen_rank_ends_its_group_which_is_replaced(harm, running, reference_greedy):
    replica = running.service.engine.pools.pool("decode")[0]
    handle, before = replica.handle, replica.engine_id
    assert isinstance(handle, RayWorker)
    assert replica.info is not None
    lead, (follower,) = replica.info.pid, await handle.rank_pids()
    assert len({lead, follower, os.getpid()}) == 3
    under_way = [asyncio.ensure_future(running.generate(prompt, 400)) for prompt in prompts(3, seed=7)]
    await running.until(lambda workers: any(worker.load.running for worker in workers))
    os.kill(follower, harm)
    await asyncio.gather(*under_way, return_exceptions=True)
    await running.until(lambda workers: before not in {worker.engine_id for worker in workers})
    await running.until_idle()
    assert replica.engine_id != before
    assert not {lead, follower} & {replica.info.pid, *await replica.handle.rank_pids()}
    for pid in (lead, follower):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    prompt = prompts(1, seed=8)[0]
    assert await running.generate(prompt, 10) == reference_greedy(running.checkpoint, prompt, 10)


@pytest.mark.slow
@pytest.mark.parametrize("loads", [False, True])
async def test_a_rank_that_freezes_while_it_starts_ends_its_start_which_is_tried_again(loads, running):
    before, log = worker_processes(), running.logs / "prefill-1-rank1.log"
    running.service.engine.scale({"prefill": 2})
    await running.until(lambda workers: log.exists() if loads else worker_processes() - before != set())
    frozen = (worker_processes() - before).pop()
    os.kill(frozen, signal.SIGSTOP)
    await running.until(lambda workers: [w.state for w in workers if w.role == "prefill"] == ["ready", "ready"])
    assert frozen not in worker_processes()
    log.unlink()
    running.service.engine.scale({"prefill": 1})
    await running.until_idle()


def worker_processes() -> set[int]:
    """Of this machine's actors, by what Ray calls them."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "cmdline").read_bytes().startswith((b"ray::WorkerActor", b"ray::FollowerActor")):
                found.add(int(folder.name))
    return found


async def test_a_model_that_cannot_be_shared_so_is_refused_before_anything_starts(tiny_checkpoint):
    config = load_config(
        environ={}, overrides={"model.path": str(tiny_checkpoint("llama")), "prefill.tensor_parallel_size": 16}
    )
    with pytest.raises(ConfigError, match="tensor parallelism of 16 does not divide the model's num_heads, which is 4"):
        async with launch(config, lambda line: None):
            pytest.fail("it started")

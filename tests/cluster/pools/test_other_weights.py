"""The files of a served model are replaced by others of equal shape: no answer is a mixture of the two."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from cluster.errors import WorkerLostError
from cluster.routing.load_tracker import LoadTracker
from fleet import prompt, tokens_of
from kv_transfer.identity import DIGEST_BYTES
from workers.block_hashes import block_hashes
from workers.errors import BatonError, ConfigError, DeadlineExceededError
from workers.messages import CacheUpdate
from workers.models.identity import tokenizer_digest

OTHER_SEED = 1


def put(source: Path, folder: Path) -> None:
    for file in source.iterdir():
        shutil.copy(file, folder / file.name)


async def refused_start(caplog: pytest.LogCaptureFixture, name: str) -> str:
    """What was said, once, of workers that were not let in."""
    while True:
        said = [r.getMessage() for r in caplog.records if r.getMessage().startswith(f"could not start {name}:")]
        if said:
            return said[0]
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
async def test_a_successor_with_other_weights_is_not_let_in(
    name, make_fleet, expected, tiny_checkpoint, tmp_path, caplog
):
    folder = tmp_path / "served"
    shutil.copytree(tiny_checkpoint("llama"), folder)
    fleet = await make_fleet(model=str(folder))
    assert await fleet.run(prompt(40), 8) == expected(prompt(40), 8)
    put(tiny_checkpoint("llama", seed=OTHER_SEED), folder)
    fleet.handle(name).crash("killed by the test")
    said = await asyncio.wait_for(refused_start(caplog, name), 60)
    assert "was loaded from another model than the one that is served: weights is" in said
    assert "restart the service" in said
    with pytest.raises((DeadlineExceededError, WorkerLostError, BatonError)):
        await fleet.run(prompt(40), 8, timeout_s=0.5)
    put(tiny_checkpoint("llama"), folder)
    await fleet.until(lambda workers: all(worker.state == "ready" for worker in workers))
    assert await fleet.run(prompt(40), 8) == expected(prompt(40), 8)
    await fleet.until_idle()


async def test_a_worker_with_another_tokenizer_than_the_gateway_is_not_let_in(make_fleet, tiny_checkpoint):
    digest = tokenizer_digest(tiny_checkpoint("llama"))
    assert digest
    fleet = await make_fleet(tokenizer=digest)
    assert [worker.state for worker in fleet.engine.workers()] == ["ready", "ready"]
    with pytest.raises(ConfigError, match=f"prefill-0 .* digest is {digest} there and 00ff here"):
        await make_fleet(tokenizer="00ff")


async def test_blocks_are_known_by_whose_they_are(make_fleet, tiny_checkpoint, monkeypatch):
    """The same prompt has other hashes with other weights, and a pair and the router have the same ones."""
    stored: dict[str, set[bytes]] = {}
    take = LoadTracker.cache_update

    def note(tracker: LoadTracker, engine_id: str, update: CacheUpdate) -> None:
        stored.setdefault(engine_id, set()).update(update.stored)
        take(tracker, engine_id, update)

    monkeypatch.setattr(LoadTracker, "cache_update", note)
    text = prompt(64)
    for seed in (0, OTHER_SEED):
        fleet = await make_fleet(model=str(tiny_checkpoint("llama", seed=seed)))
        salt = fleet.engine.cache_identity
        assert len(salt) == DIGEST_BYTES
        await fleet.run(text, 4)
        again = fleet.start(text, 4)
        assert len([token async for token in tokens_of(again)]) == 4
        report = await again.report()
        assert (report.cached_tokens, report.decode_cached_tokens) == (48, 64)
        assert [held for held in stored.values() if held >= set(block_hashes(text, 16, salt))] == [*stored.values()][
            -2:
        ]
    everybody = [*stored.values()]
    assert len(everybody) == 4
    assert not (everybody[0] | everybody[1]) & (everybody[2] | everybody[3])

"""The files of a served model are replaced by others of equal shape: no answer is a mixture of the two."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from cluster.errors import WorkerLostError
from fleet import prompt
from workers.errors import BatonError, DeadlineExceededError

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

"""The page in a real browser: it shows what there is, and follows a scaling, a drain, a loss and a new gateway."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import chromium
from cluster.config.schema import MetricsConfig
from cluster.gateway.readiness import Health
from cluster.live.history import Objectives
from cluster.live.observed import observed
from cluster.live.starting import StartingAnswers
from cluster.pools.groups import PoolLimits
from cluster.server.pages.serve import serve_pages
from fleet import prompt, tokens_of

pytestmark = pytest.mark.skipif(chromium.PROGRAM is None, reason="there is no Chromium here")

MODEL = SimpleNamespace(name="tiny", architecture="llama", max_model_len=512)
READINESS = SimpleNamespace(health=Health(True, ""))
PNG = b"\x89PNG\r\n"


@pytest.mark.slow
async def test_the_page_follows_the_service(make_fleet, tmp_path, unused_tcp_port_factory):
    limits = {"prefill": PoolLimits(target=1), "decode": PoolLimits(target=2)}
    fleet = await make_fleet(2, 2, max_num_seqs=4, limits=limits)
    config = MetricsConfig(port=unused_tcp_port_factory())
    async with (
        chromium.chromium(tmp_path / "profile") as page,
        observed(fleet.engine, None, MODEL, READINESS, Objectives(60.0, 10.0)) as seen,
    ):
        await page.show(1280, 900)
        async with serve_pages(config, 0, seen.answers) as address:
            await page.open(address)
            await page.until("document.body?.dataset.shown")
            assert await page.value("document.querySelector('#health span').textContent") == "ready"
            assert await page.value("document.querySelectorAll('.worker.ready').length") == 3
            running = fleet.start(prompt(40), 400)
            await anext(running)
            await page.until("!!document.querySelector('#requests .tag:is(.decode, .length)')")
            await page.until("document.querySelectorAll('#handoffs li').length === 1")
            assert "prefill-0 → decode-" in await page.value("document.querySelector('#requests .where').textContent")
            assert (await page.screenshot()).startswith(PNG)

            fleet.engine.scale({"prefill": 2, "decode": 1})  # one comes; one goes, when it has finished
            await page.until("document.querySelectorAll('#prefill .worker.ready').length === 2")
            await page.until("document.querySelector('#events').textContent.includes('drains')")
            _ = [token async for token in tokens_of(running)]
            await page.until("document.querySelectorAll('#decode .worker').length === 1")
            await page.until("!!document.querySelector('#requests .tag.length')")

            fleet.handle("prefill-0").crash("killed by the test")
            await page.until("document.querySelector('#events').textContent.includes('prefill-0 is gone')")
            await page.until("document.querySelectorAll('.worker.ready').length === 3")

            for scheme in ("light", "dark"):  # a phone
                await page.show(390, 844, scheme)
                assert await page.until("innerWidth === 390 && document.documentElement.scrollWidth") <= 390
                background = await page.value("getComputedStyle(document.body).backgroundColor")
                assert (background == "rgb(19, 19, 22)") == (scheme == "dark")
        await page.until("!document.querySelector('#banner').hidden")
        assert await page.value("document.body.classList.contains('stale')")
        starting = StartingAnswers()
        starting.step = "loading tiny"
        async with serve_pages(config, 0, starting):
            await page.until("document.querySelector('#banner').textContent.includes('starting: loading tiny')")
            await page.open(address)  # who comes now sees the page, and the same
            await page.until("document.querySelector('#banner')?.textContent.includes('starting: loading tiny')")
        async with (
            observed(fleet.engine, None, MODEL, READINESS, Objectives()) as again,
            serve_pages(config, 0, again.answers),
        ):
            await page.until("document.querySelector('#banner').hidden")
            assert await page.value("document.querySelectorAll('.worker.ready').length") == 3

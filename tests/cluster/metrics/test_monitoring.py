"""The board and the alert rules ask for metrics that there are, in PromQL that Prometheus takes and answers."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from cluster.config.schema import MetricsConfig
from cluster.gateway.readiness import Health
from cluster.live.history import Objectives
from cluster.live.observed import observed
from cluster.metrics.catalog import CATALOG
from cluster.server.pages.serve import serve_pages
from fleet import prompt
from workers.errors import CapacityError

DEPLOY = Path(__file__).parents[3] / "deploy"
RULES = DEPLOY / "prometheus" / "alerts.yaml"
BOARD = json.loads((DEPLOY / "grafana" / "baton.json").read_text())
QUERIES = [target["expr"] for panel in BOARD["panels"] for target in panel.get("targets", ())]
ALERTS = [rule["expr"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
PROMETHEUS = shutil.which("prometheus")
MODEL = SimpleNamespace(name="tiny", architecture="llama", max_model_len=512)
READINESS = SimpleNamespace(health=Health(True, ""))


def published() -> set[str]:
    ends = {"histogram": ("_bucket", "_sum", "_count")}
    return {f"baton:{metric.published_name}{end}" for metric in CATALOG for end in ends.get(metric.kind, ("",))}


@pytest.mark.parametrize("queries", [QUERIES, ALERTS], ids=["board", "alerts"])
def test_every_metric_that_is_asked_for_is_published(queries):
    asked = {name for query in queries for name in re.findall(r"\bbaton:\w+", query)}
    assert len(asked) > 8
    assert asked - published() == set()


def test_panels_lie_beside_each_other():
    cells = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        across, down = (range(place[at], place[at] + place[size]) for at, size in (("x", "w"), ("y", "h")))
        own = {(x, y) for x in across for y in down}
        assert not own & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        cells |= own


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool here")
def test_promtool_takes_the_rules():
    checked = subprocess.run(["promtool", "check", "rules", RULES], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stderr
    assert f"{len(ALERTS)} rules found" in checked.stdout


@contextmanager
def prometheus(folder: Path, target: str, port: int):
    """A Prometheus that scrapes a target all the time; yields how to ask it for the value of a query."""
    scrape = {"job_name": "baton", "scrape_interval": "1s", "scrape_timeout": "1s"}
    config = {"scrape_configs": [{**scrape, "static_configs": [{"targets": [target]}]}], "rule_files": [str(RULES)]}
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    flags = [f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data"]
    process = subprocess.Popen(
        [PROMETHEUS, *flags, f"--web.listen-address=127.0.0.1:{port}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def ask(query: str) -> list:
        asked = urllib.parse.urlencode({"query": query})
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?{asked}", timeout=5) as answer:
            said = json.load(answer)
        assert said["status"] == "success", said
        return said["data"]["result"]

    try:
        yield ask
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.skipif(PROMETHEUS is None, reason="there is no Prometheus here")
async def test_every_query_of_the_board_is_answered_by_a_running_service(make_fleet, tmp_path, unused_tcp_port_factory):
    fleet = await make_fleet(2, 1)

    async def some_of_each(seed: int) -> None:
        """A request that is answered, one that fails, and one that goes on elsewhere."""
        await fleet.run(prompt(40, seed=seed), 4)
        with pytest.raises(CapacityError):
            await fleet.run([5] * 600, 4)
        fleet.crash_one_on_submit("prefill-0", "prefill-1")
        await fleet.run(prompt(40, seed=seed + 10), 4)
        await fleet.until_idle()  # the lost worker's successor is there

    async with observed(fleet.engine, None, MODEL, READINESS, Objectives()) as seen:
        await some_of_each(0)  # series that begin with their first request have a rate after the next one
        port = unused_tcp_port_factory()
        async with serve_pages(MetricsConfig(port=port), 0, seen.answers):
            with prometheus(tmp_path, f"127.0.0.1:{port}", unused_tcp_port_factory()) as ask:

                async def answers(query: str) -> list:
                    filled = query.replace("$__rate_interval", "20s").replace("$model", "tiny")
                    async with asyncio.timeout(30):
                        while True:
                            try:
                                if found := await asyncio.to_thread(ask, filled):
                                    return found
                            except OSError:
                                pass
                            await asyncio.sleep(0.1)

                await answers("rate(baton:prompt_tokens_total[20s])")
                await some_of_each(1)
                await answers("rate(baton:migrations_total[20s]) > 0")
                for query in QUERIES:
                    assert all(one["value"][1] != "" for one in await answers(query)), query

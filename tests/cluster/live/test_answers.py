"""What is answered over HTTP, without a browser."""

from __future__ import annotations

import json
from types import SimpleNamespace

import httpx2
import pytest

from cluster.api import Explanation
from cluster.config.schema import MetricsConfig
from cluster.gateway.readiness import Health
from cluster.live.history import LiveHistory, Objectives
from cluster.live.observed import observed
from cluster.live.seconds import Seconds, quantile
from cluster.routing.types import CandidateReport
from cluster.server.pages.serve import page_warnings, serve_pages
from fleet import prompt, tokens_of
from workers.errors import ConfigError, InvalidRequestError

MODEL = SimpleNamespace(name="tiny", architecture="llama", max_model_len=512)
READINESS = SimpleNamespace(health=Health(True, ""))


class Explains:
    """A `Generation` that explains."""

    async def explain(self, request):
        if request.prompt == "wrong":
            raise InvalidRequestError("the prompt is wrong")
        far = CandidateReport("p-0.1", "d-0.1", float("inf"), 0.01, float("inf"), "its batch is full", False)
        return Explanation(len(request.prompt), request.sampling.max_tokens or 1, (far,))


@pytest.fixture
async def looked_at(make_fleet):
    fleet = await make_fleet(1, 1)
    async with observed(fleet.engine, Explains(), MODEL, READINESS, Objectives(60.0, 10.0)) as seen:
        yield fleet, seen


async def test_a_request_is_in_the_snapshot_while_it_runs_and_when_it_is_over(looked_at):
    fleet, seen = looked_at

    async def live():
        answer = await seen.answers.respond("GET", "/live.json", {})
        assert answer.headers["content-type"] == "application/json"
        return json.loads(answer.body)

    running = fleet.start(prompt(40), 60)
    await anext(running)
    (request,) = (await live())["requests"]
    assert request["state"] in ("handoff", "decode")
    assert request["prompt_tokens"] == 40
    assert request["decode"].startswith("decode-0.")
    assert request["expected"]["ttft_s"] > 0
    _ = [token async for token in tokens_of(running)]
    await fleet.until_idle()
    now = await live()
    (request,) = now["requests"]
    assert (request["state"], request["output_tokens"]) == ("length", 60)
    assert now["totals"]["finished"] == now["totals"]["good"] == now["totals"]["handoffs"] == 1
    assert now["lately"]["good_share"] == 1.0
    assert sum(now["series"]["good"]) * now["series"]["step_s"] == pytest.approx(1.0)
    assert now["handoffs"][0]["bytes"] == request["kv_bytes"] > 0
    assert [worker["name"] for worker in now["workers"]] == ["prefill-0", "decode-0"]
    assert now["links"][0]["bytes_per_s"] > 0
    assert now["health"] == {"ready": True, "reason": ""}
    assert str(prompt(40)[0]) not in str(request["id"])


async def test_the_server_answers_on_loopback_by_its_own_name_only(looked_at, unused_tcp_port_factory):
    _, seen = looked_at
    port = unused_tcp_port_factory()
    async with serve_pages(MetricsConfig(port=port), 0, seen.answers) as address, httpx2.AsyncClient() as client:
        assert address == f"http://127.0.0.1:{port}/"
        page = await client.get(address)
        assert "<title>Baton</title>" in page.text
        assert "<style>" in page.text
        assert "page.css" not in page.text, "the first answer is all that the first paint needs"
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert (await client.get(f"{address}page.js")).headers["content-type"].startswith("text/javascript")
        wanted = (
            "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"  # Prometheus's own
        )
        metrics = await client.get(f"{address}metrics", headers={"accept": wanted})
        assert metrics.headers["content-type"].startswith("text/plain")
        assert "\nbaton:num_requests_running{" in metrics.text, "names keep their colon"
        assert (await client.head(f"{address}live.json")).content == b""
        refusals = [
            (await client.get(f"{address}nothing"), 404),
            (await client.post(f"{address}metrics"), 405),
            (await client.get(address, headers={"host": "evil.example"}), 421),
            (await client.post(f"{address}explain", content=b"x" * 300_000), 413),
            (await client.post(f"{address}explain", content=b"no json"), 400),
            (await client.post(f"{address}explain", json={"prompt": "wrong"}), 400),
        ]
        assert [answer.status_code for answer, _ in refusals] == [status for _, status in refusals]
        assert refusals[-1][0].json() == {"error": "the prompt is wrong"}
        said = (await client.post(f"{address}explain", json={"prompt": "hello", "max_tokens": 7})).json()
        assert (said["prompt_tokens"], said["max_tokens"]) == (5, 7)
        assert said["pairs"][0]["ttft_s"] is None, "JSON has no infinity"
        with pytest.raises(ConfigError, match=r"choose another metrics\.port"):
            async with serve_pages(MetricsConfig(port=port), 0, seen.answers):
                pass
        async with serve_pages(MetricsConfig(), port - 1, seen.answers) as other:
            assert (await client.get(f"{other}metrics")).status_code == 200, "the next port is taken: a free one"


def test_who_shows_the_page_beyond_this_machine_is_warned():
    assert page_warnings(MetricsConfig()) == page_warnings(MetricsConfig(enabled=False, host="0.0.0.0")) == []
    (warning,) = page_warnings(MetricsConfig(host="0.0.0.0"))
    assert "request ids and users" in warning


def test_seconds_become_steps_and_old_ones_are_forgotten():
    now = [1000.0]
    seconds = Seconds(lambda: now[0])
    seconds.current.arrived += 5
    seconds.current.ttft_s.append(0.5)
    now[0] = 1007.0
    seconds.current.arrived += 10
    series = seconds.series()
    assert series["arrived"][-2:] == [1.0, 2.0]
    assert series["ttft_p50_s"][-2:] == [0.5, None]
    assert [second.arrived for second in seconds.last(5)] == [10]
    now[0] = 1400.0
    assert not any(seconds.series()["arrived"])
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0


def test_a_worker_that_drains_has_left_and_one_that_is_lost_is_gone():
    history = LiveHistory(Objectives())
    for name, *states in (("a.1", "ready", "draining", "lost"), ("b.1", "ready", "lost"), ("c.1", "draining", "ready")):
        for state in states:
            history.worker_state_changed(name, "decode", state)
    assert [event["text"] for event in history.events] == [
        "a is ready", "a drains: it finishes what it has", "a has left", "b is ready", "b is gone",
        "c drains: it finishes what it has", "c stays after all",
    ]  # fmt: skip

"""`baton top` at the widths that terminals have."""

from __future__ import annotations

import asyncio
import io

import pytest
from rich.console import Console

from cluster.cli.main import main
from cluster.cli.top import look
from cluster.cli.top_view import spark, view
from cluster.config.schema import MetricsConfig
from cluster.live.starting import StartingAnswers
from cluster.server.pages.serve import serve_pages
from workers.errors import ConfigError

LOAD = {
    "total_blocks": 100, "free_blocks": 25, "reserved_blocks": 5, "quarantined_blocks": 1, "running": 3, "waiting": 2,
    "waiting_tokens": 70, "preempted": 0,
}  # fmt: skip


def worker(name: str, role: str, state: str = "ready") -> dict:
    return {
        "name": name, "role": role, "group": "", "state": state, "device": "cpu", "backend": "CPU_ATTN", "load": LOAD,
        "silent_s": 0.2,
    }  # fmt: skip


LIVE = {
    "now": 1000.0,
    "started": 400.0,
    "model": {"name": "recall"},
    "health": {"ready": True, "reason": ""},
    "lately": {
        "requests_per_s": 2.5, "good_share": 0.97, "tokens_per_s": 61.2, "kv_bytes_per_s": 1.9e6, "ttft_p50_s": 0.054,
        "ttft_p90_s": 0.232, "tpot_p50_s": 0.0084,
    },
    "series": {name: [None, 1.0, 2.0] for name in ("finished", "good", "ttft_p50_s", "tpot_p50_s", "tokens", "queued")},
    "running": 3,
    "queued": 1,
    "workers": [worker("prefill-0", "prefill"), worker("decode-0", "decode", "draining")],
    "requests": [
        {
            "id": "chat-[bold]1", "user": "ada", "state": "decode", "prompt_tokens": 451, "output_tokens": 40,
            "error": "", "prefill": "prefill-0.1f", "decode": "decode-0.2e", "ttft_s": 0.112, "queue_s": 0.001,
            "prefill_s": 0.1,
            "exposed_s": 0.0005, "kv_bytes": 1_400_000, "expected": {"ttft_s": 0.04},
        },
        {"id": "mail-2", "user": "", "state": "error", "prompt_tokens": 9, "output_tokens": 0, "error": "Capacity: no"},
    ],
    "events": [{"at": 990.0, "kind": "bad", "text": "decode-1 is gone"}],
}  # fmt: skip


def drawn(width: int, height: int | None = None) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(view(LIVE, width, height))
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 200])
def test_what_matters_is_there_at_every_width_and_no_line_is_longer(width):
    lines = drawn(width)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width
    for shown in (
        "● ready",
        "recall",
        "97 %",
        "prefill-0",
        "draining",
        "75 %",
        "chat-[bold]1",
        "451+40",
        "decode-1 is gone",
    ):
        assert shown in text, shown
    assert ("quarantined" in text) == ("expected" in text) == (width == 200)


def test_a_low_terminal_is_not_overrun():
    assert len(drawn(80, 24)) <= 24


def test_bars_are_as_high_as_their_values():
    assert spark([None, 0.0, 1.0, 2.0], 4) == "  ▄█"
    assert spark([0.0, 0.0], 8) == "  "


def test_an_address_where_nobody_is_or_somebody_else_is_told(capsys):
    assert main(["top", "--once", "--url", "http://127.0.0.1:1"]) == 1
    assert "baton up` names the page's address" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="must begin with http"):
        look("ftp://somewhere")


async def test_a_service_that_is_starting_is_told_from_one_that_is_not_there(unused_tcp_port):
    answers = StartingAnswers()
    answers.step = "loading tiny"
    async with serve_pages(MetricsConfig(port=unused_tcp_port), 0, answers) as url:
        with pytest.raises(ConfigError, match="the service is starting: loading tiny"):
            await asyncio.to_thread(look, url)

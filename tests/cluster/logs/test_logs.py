"""What a log says of a request, and in which form."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys

import pytest

from cluster.gateway.request_lines import RequestLines
from cluster.logs.formats import formatter
from cluster.logs.setup import log_to_file
from fleet import prompt, tokens_of
from workers.errors import CapacityError


@pytest.fixture
def lines():
    """A logger, and what it has written as JSON so far."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter("json", "gateway"))
    logger = logging.Logger("baton.requests", logging.INFO)
    logger.addHandler(handler)
    return logger, lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


async def test_each_request_has_one_line_at_its_end_and_no_prompt_in_it(make_fleet, lines):
    logger, written = lines
    fleet = await make_fleet()
    fleet.engine.observe(RequestLines(logger))
    stream = fleet.start(prompt(100), 8)
    assert len([token async for token in tokens_of(stream)]) == 8
    await fleet.until_idle()
    left = fleet.start(prompt(20), 400)
    await anext(left)
    await left.aclose()
    with pytest.raises(CapacityError):
        await fleet.run([5] * 600, 4)
    finished, cancelled, failed = written()
    report = await stream.report()
    assert finished["outcome"] == "length"
    assert (finished["prompt_tokens"], finished["output_tokens"], finished["attempts"]) == (100, 8, 1)
    assert (finished["prefill_worker"], finished["decode_worker"]) == (report.prefill_worker, report.decode_worker)
    assert finished["ttft_s"] == pytest.approx(report.ttft_s, abs=1e-6)
    assert finished["kv_bytes"] == report.kv_bytes > 0
    assert finished["total_s"] >= finished["ttft_s"] > finished["prefill_s"] > 0
    assert (finished["level"], finished["process"], finished["logger"]) == ("INFO", "gateway", "baton.requests")
    assert finished["request_id"] in finished["message"]
    assert (cancelled["outcome"], cancelled["request_id"] != finished["request_id"]) == ("abort", True)
    assert failed["outcome"] == "error"
    assert failed["error"].startswith("CapacityError: ")
    assert "prefill_worker" not in failed
    assert not any("prompt" in line for line in (finished, cancelled, failed))


async def test_prompts_are_logged_when_they_are_asked_for_and_cannot_begin_a_line(make_fleet, lines):
    logger, written = lines
    fleet = await make_fleet()
    fleet.engine.observe(RequestLines(logger, decode=lambda ids: f"of {len(ids)}\ntokens"))
    await fleet.run(prompt(20), 1)
    (line,) = written()
    assert line["prompt"] == "of 20\ntokens"
    assert line["message"].endswith(r"prompt 'of 20\ntokens'")


def test_text_names_the_process_and_json_keeps_what_is_extra():
    record = logging.makeLogRecord({"name": "a.b", "msg": "%d blocks", "args": (3,), "levelname": "INFO", "extra": 1})
    assert formatter("text", "100%-0").format(record).endswith("INFO 100%-0 a.b: 3 blocks")
    line = json.loads(formatter("json", "decode-0").format(record))
    assert (line["process"], line["message"], line["extra"]) == ("decode-0", "3 blocks", 1)
    try:
        raise ValueError("wrong")
    except ValueError:
        record.exc_info = sys.exc_info()
    assert "ValueError: wrong" in json.loads(formatter("json", "decode-0").format(record))["exception"]


def test_a_workers_log_is_called_as_it_is_and_one_that_cannot_be_written_stops_nobody(tmp_path):
    program = f"""
import logging
from pathlib import Path
from cluster.logs.setup import log_to_file
assert log_to_file("info", "json", "decode-0", Path({str(tmp_path)!r}) / "logs") is not None
logging.getLogger("workers").info("here", extra={{"request_id": "chat-1"}})
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    (line,) = (tmp_path / "logs" / "decode-0.log").read_text().splitlines()
    assert json.loads(line)["request_id"] == "chat-1"
    (tmp_path / "file").touch()
    assert log_to_file("info", "json", "decode-0", tmp_path / "file") is None

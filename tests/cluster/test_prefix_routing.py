"""A conversation goes back to the prefill worker that knows its beginning, and the client hears what it saved."""

from __future__ import annotations

import pytest

from fleet import prompt, tokens_of
from made_requests import engine_request
from workers.sampling_params import SamplingParams


@pytest.mark.usefixtures("like_workers")
async def test_a_conversation_goes_back_to_its_worker(make_fleet, expected):
    fleet = await make_fleet(2, 1)
    turns = [prompt(100), prompt(130), prompt(200)]
    reports = []
    for turn in turns:
        stream = fleet.start(turn, 4)
        assert [token async for token in tokens_of(stream)] == expected(turn, 4)
        reports.append(await stream.report())
        await fleet.until_idle()
    assert turns[1][:100] == turns[0], "each goes on where the one before ended"
    assert [report.cached_tokens for report in reports] == [0, 96, 128]
    assert len({report.prefill_worker for report in reports}) == 1
    sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=4)
    pairs = fleet.engine.explain(engine_request("r", turns[2], sampling))
    assert [(pair.prefill == reports[0].prefill_worker, pair.cached_tokens) for pair in pairs] == [
        (True, 192),
        (False, 0),
    ]


@pytest.mark.usefixtures("like_workers")
async def test_the_next_turn_moves_only_what_is_new(make_fleet, expected):
    """Decode has what it generated, but for the last token; the client hears what was not moved."""
    fleet = await make_fleet(1, 1)
    text, reports = prompt(90), []
    for new in (5, 0):
        stream = fleet.start(text, 30)
        answer = [token async for token in tokens_of(stream)]
        assert answer == expected(text, 30)
        reports.append(await stream.report())
        await fleet.until_idle()
        text = text + answer + prompt(new)
    assert [report.decode_cached_tokens for report in reports] == [0, (90 + 30 - 1) // 16 * 16]
    assert [report.kv_bytes // reports[0].kv_bytes for report in reports] == [1, 0]
    assert reports[1].kv_bytes * 6 == reports[0].kv_bytes, "one block of the 125 tokens is not there, six were moved"


@pytest.mark.usefixtures("like_workers")
async def test_requests_of_unlike_salts_share_no_block(make_fleet, expected):
    fleet = await make_fleet(1, 1)
    sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=4, ignore_eos=True)
    cached = []
    for number, salt in enumerate((b"", b"", b"a", b"b", b"a")):
        stream = fleet.engine.generate(engine_request(f"r{number}", prompt(90), sampling, cache_salt=salt))
        assert [token async for token in tokens_of(stream)] == expected(prompt(90), 4)
        report = await stream.report()
        cached.append((report.cached_tokens, report.decode_cached_tokens))
        await fleet.until_idle()
    assert cached == [(0, 0), (80, 80), (0, 0), (0, 0), (80, 80)]

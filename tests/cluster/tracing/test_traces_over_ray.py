"""One request's trace over Ray and NIXL."""

from __future__ import annotations

import time

import pytest

from cluster.config.load import load_config
from cluster.generation.text_generation import GenerationRequest
from cluster.launch import launch
from cluster.recall import EXAMPLE
from workers.sampling_params import SamplingParams

pytest.importorskip("opentelemetry.sdk", reason="OpenTelemetry is not installed")
from otlp_collector import collector

pytestmark = [pytest.mark.ray, pytest.mark.nixl, pytest.mark.slow]


async def test_spans_of_both_workers_are_below_the_gateways_and_add_up_to_the_first_token(tmp_path):
    with collector() as (endpoint, spans):
        settings = {
            "tracing.enabled": True,
            "tracing.endpoint": endpoint,
            "logging.folder": str(tmp_path / "logs"),
            "logging.level": "debug",
            "logging.format": "json",
        }
        async with launch(load_config(environ={}, overrides=settings), lambda line: None) as service:
            for request_id in ("warm-up", "chat-1"):
                sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
                request = GenerationRequest(
                    request_id=request_id, sampling=sampling, timeout_s=60.0, prompt=EXAMPLE * 8
                )
                began = time.monotonic()
                came = None
                async for chunk in service.generation.generate(request):
                    came = came or time.monotonic()
                    report = chunk.report
        root = next(
            span
            for span in spans
            if span.name == "request" and span.attributes["baton.request_id"].string_value == "chat-1"
        )
        own = {span.name: span for span in spans if span.trace == root.trace}
        assert (own["prefill"].parent, own["decode"].parent) == (root.id, root.id)
        assert (own["prefill"].instance, own["decode"].instance) == ("prefill-0", "decode-0")
        assert own["kv_transfer"].attributes["bytes"].int_value == report.kv_bytes > 0
        way = ("queue", "dispatch", "prefill.queue", "prefill.compute", "first_token.return")
        until_first_token = sum(own[name].seconds for name in way)
        assert until_first_token == pytest.approx(report.ttft_s, abs=0.002)
        assert own["tokenize"].seconds + until_first_token <= came - began + 0.002
        assert "baton.clock_shift_s" not in own["prefill"].attributes, "one machine has one clock"
    for name in ("prefill-0", "decode-0"):
        assert '"request_id": "chat-1"' in (tmp_path / "logs" / f"{name}.log").read_text()

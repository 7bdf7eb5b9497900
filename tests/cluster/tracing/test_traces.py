"""A request's trace: exported by OTLP to a collector of the test's own, spans of both workers under the gateway's."""

from __future__ import annotations

import asyncio

import pytest

from cluster import trace_context
from cluster.client.client import AsyncBatonClient
from cluster.tracing.clocks import shift_into
from fleet import prompt, tokens_of
from made_requests import engine_request
from workers.sampling_params import SamplingParams

pytest.importorskip("opentelemetry.sdk", reason="OpenTelemetry is not installed")
from cluster.tracing.exporting import otlp_targets
from cluster.tracing.observer import TraceRequests
from otlp_collector import Span, collector

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
STATE = "congo=t61rcWkgMzE,rojo@eu=00f067aa0ba902b7"


@pytest.fixture
async def traced(make_fleet):
    """Start a fleet whose requests are traced; and `spans()` waits for what has ended."""
    with collector() as (endpoint, spans):
        targets = otlp_targets(endpoint, 1.0, "baton")

        async def make(*args, **kwargs):
            fleet = await make_fleet(*args, **kwargs)
            fleet.engine.observe(TraceRequests(targets))

            async def ended() -> list[Span]:
                await fleet.until_idle()
                await asyncio.to_thread(targets.flush)
                return spans

            return fleet, ended

        yield make
        await asyncio.to_thread(targets.close)


async def test_a_trace_goes_through_both_workers_and_its_times_add_up(traced):
    fleet, ended = await traced()
    sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=8, ignore_eos=True)
    request = engine_request("r", prompt(150), sampling, traceparent=CALLER, tracestate=STATE)
    began = asyncio.get_running_loop().time()
    stream = fleet.engine.generate(request)
    first = await anext(stream)
    ttft_s = asyncio.get_running_loop().time() - began
    assert len(first.tokens) + len([token async for token in tokens_of(stream)]) == 8
    report = await stream.report()
    spans = {span.name: span for span in await ended()}
    root = spans["request"]
    assert (root.trace, root.parent) == (CALLER[3:35], CALLER[36:52]), "the caller's trace goes on"
    assert {span.trace for span in spans.values()} == {root.trace}
    assert {span.state for span in spans.values()} == {STATE}
    for name, parent, instance in (
        ("queue", "request", "gateway"),
        ("dispatch", "request", "gateway"),
        ("prefill", "request", "prefill-0"),
        ("prefill.queue", "prefill", "prefill-0"),
        ("prefill.compute", "prefill", "prefill-0"),
        ("chunk", "prefill", "prefill-0"),
        ("kv_transfer", "prefill", "prefill-0"),
        ("first_token.return", "request", "gateway"),
        ("decode", "request", "decode-0"),
        ("decode.kv_wait", "decode", "decode-0"),
        ("decode.first_token", "decode", "decode-0"),
        ("decode.generate", "decode", "decode-0"),
    ):
        assert (spans[name].parent, spans[name].instance) == (spans[parent].id, instance), name
    assert len([span for span in await ended() if span.name == "chunk"]) == 3, "150 tokens, 64 at most in a step"
    assert len([event for event in spans["prefill"].events if event == "push"]) >= 3, "each layer of the model"
    way = ("queue", "dispatch", "prefill.queue", "prefill.compute", "first_token.return")
    assert sum(spans[name].seconds for name in way) == pytest.approx(report.ttft_s, abs=0.002)
    assert sum(spans[name].seconds for name in way) <= ttft_s + 0.002
    assert spans["kv_transfer"].attributes["bytes"].int_value == report.kv_bytes
    assert spans["decode"].attributes["output_tokens"].int_value == 8
    assert root.attributes["gen_ai.usage.output_tokens"].int_value == 8
    assert root.start - 0.002 <= spans["decode"].start < spans["decode"].end <= root.end + 0.3


async def test_prompts_computed_where_they_are_decoded_are_traced_and_so_are_failures(traced):
    fleet, ended = await traced(1, 1, disaggregation="never")
    await fleet.run(prompt(40), 4)
    late = fleet.start(prompt(20), 400, timeout_s=0.05)
    with pytest.raises(Exception, match="deadline"):
        _ = [token async for token in late]
    spans = await ended()
    done, failed = [span for span in spans if span.name == "request"]
    assert (done.failed, failed.failed) == (False, True)
    assert failed.attributes["baton.outcome"].string_value == "error"
    assert {span.instance for span in spans if span.name == "prefill.compute"} == {"decode-0"}
    assert len({span.trace for span in spans}) == 2


async def test_a_request_whose_client_leaves_has_the_spans_of_its_workers_until_then(traced):
    fleet, ended = await traced()
    stream = fleet.start(prompt(150), 300)
    for _ in range(3):
        await anext(stream)
    await stream.aclose()
    spans = {span.name: span for span in await ended()}
    root, decode = spans["request"], spans["decode"]
    assert root.attributes["baton.outcome"].string_value == "abort"
    assert (decode.parent, decode.instance) == (root.id, "decode-0")
    assert decode.attributes["stopped"].string_value == "the request was cancelled"
    assert 2 <= decode.attributes["output_tokens"].int_value < 300
    assert {"prefill", "prefill.compute", "decode.kv_wait", "decode.generate"} <= spans.keys()


@pytest.mark.parametrize(
    ("lost", "waits", "parts"),
    [
        ("prefill-0", "decode", {"decode.kv_wait"}),
        ("decode-0", "prefill", {"prefill.queue", "prefill.compute", "chunk", "kv_transfer"}),
    ],
)
async def test_a_request_that_is_late_has_the_spans_of_the_worker_that_waited(traced, lost, waits, parts):
    fleet, ended = await traced()
    fleet.handle(lost).submit = lambda request: None
    with pytest.raises(Exception, match="deadline"):
        await fleet.run(prompt(20), 4, timeout_s=0.5)
    spans = {span.name: span for span in await ended()}
    root = spans["request"]
    assert spans[waits].parent == root.id
    assert spans[waits].attributes["stopped"].string_value
    of_the_gateway = {"queue", "dispatch", "first_token.return"}
    assert spans.keys() - of_the_gateway == {"request", waits} | parts
    assert all(spans[part].parent == spans[waits].id for part in parts)


async def test_what_is_not_sampled_costs_workers_nothing(make_fleet):
    with collector() as (endpoint, spans):
        targets = otlp_targets(endpoint, 0.0, "baton")
        fleet = await make_fleet()
        fleet.engine.observe(TraceRequests(targets))
        sent = []
        handle = fleet.handle("prefill-0")
        submit = handle.submit
        handle.submit = lambda request: (sent.append(request.traced), submit(request))
        await fleet.run(prompt(20), 2)
        await asyncio.to_thread(targets.close)
        assert (sent, spans) == ([False], [])


@pytest.mark.parametrize(
    ("headers", "taken"),
    [
        ([("traceparent", CALLER)], CALLER),
        ([("traceparent", CALLER.encode())], CALLER),
        ([("traceparent", CALLER), ("traceparent", CALLER)], ""),
        ([("traceparent", CALLER.replace("0af7651916cd43dd8448eb211c80319c", "0" * 32))], ""),
        ([("traceparent", "nonsense")], ""),
        ([], ""),
    ],
)
def test_a_door_takes_a_valid_trace_context_only(headers, taken):
    trace_context.accept(headers)
    assert trace_context.get().parent == taken


@pytest.mark.parametrize(
    ("states", "taken"),
    [
        ([STATE], STATE),
        (["congo=t61rcWkgMzE , ", b"\trojo@eu=00f067aa0ba902b7"], STATE),
        (["congo=1,congo=2"], ""),
        (["Congo=1"], ""),
        (["congo"], ""),
        ([",".join(f"k{number}=1" for number in range(33))], ""),
        (["a=" + "1" * 200, "b=" + "1" * 100, "c=" + "1" * 201, "d=2"], "b=" + "1" * 100 + ",d=2"),
        ([",".join(f"k{number}=" + "1" * 100 for number in range(6))],
         ",".join(f"k{number}=" + "1" * 100 for number in range(4))),
    ],
)  # fmt: skip
def test_what_tracing_systems_have_said_goes_with_a_valid_context(states, taken):
    headers = [("tracestate", state) for state in states]
    trace_context.accept([*headers, ("traceparent", CALLER)])
    assert trace_context.get() == (CALLER, taken)
    trace_context.accept(headers)
    assert trace_context.get() == ("", "")


def test_a_program_in_a_span_hands_its_trace_on():
    from opentelemetry.sdk.trace import TracerProvider

    assert trace_context.outgoing() == []
    with TracerProvider(shutdown_on_exit=False).get_tracer("test").start_as_current_span("mine") as span:
        ((name, value),) = trace_context.outgoing()
        assert (name, value[3:35]) == ("traceparent", f"{span.get_span_context().trace_id:032x}")
    with in_a_span():
        assert dict(trace_context.outgoing())["tracestate"] == STATE


def in_a_span():
    """This program's span, which goes on with the caller's trace."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    caller = TraceContextTextMapPropagator().extract({"traceparent": CALLER, "tracestate": STATE})
    return TracerProvider(shutdown_on_exit=False).get_tracer("test").start_as_current_span("mine", caller)


async def test_a_trace_comes_in_through_the_grpc_door(serve, answer):
    served = await serve(answer("hi"))
    async with AsyncBatonClient(served.connection) as client:
        with in_a_span() as span:
            _ = [chunk async for chunk in client.generate("one")]
        _ = [chunk async for chunk in client.generate("two")]
    inside, outside = served.engine.requests
    assert inside.traceparent[3:52] == f"{CALLER[3:35]}-{span.get_span_context().span_id:016x}"
    assert inside.tracestate == STATE
    assert inside.received > 0
    assert outside.traceparent == ""


def test_clocks_that_disagree_are_moved_between_what_is_known():
    assert shift_into(10.0, 11.0, 9.0, 12.0) == 0.0
    assert shift_into(60.0, 61.0, 9.0, 12.0) == -50.0, "in the middle, a second before and behind it"
    assert shift_into(1.0, 9.0, 9.0, 12.0) == 8.0, "what cannot lie between begins with it"

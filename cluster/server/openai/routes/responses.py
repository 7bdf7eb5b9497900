"""/v1/responses, for text and calls of functions. Nothing is kept: a later request brings the conversation with it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from cluster.api import EngineRequest
from cluster.generation.conversations import Conversation
from cluster.generation.text_generation import GenerationRequest
from cluster.generation.whole_answer import held_bytes
from cluster.server.openai import sse
from cluster.server.openai.answers.parts import Head
from cluster.server.openai.answers.response import ResponseWriter
from cluster.server.openai.bounded_route import BoundedRoute, off_loop
from cluster.server.openai.call import StreamCall, WholeCall
from cluster.server.openai.door import door_of
from cluster.server.openai.request_id import request_id_of
from cluster.server.openai.requests.response import ResponseRequest
from cluster.server.openai.requests.unsupported import check_fields
from cluster.server.openai.routes.answering import usage_of
from workers.sampling_params import SamplingParams

router = APIRouter(route_class=BoundedRoute)


@router.post("/v1/responses")
async def responses(body: ResponseRequest, request: Request) -> Response:
    """Answer a text or go on with a conversation."""
    door = door_of(request)
    served, request_id = door.served, request_id_of(request)
    check_fields(body)
    generation = served.generation
    own = {"max_tokens": body.max_output_tokens, "logprobs": body.num_logprobs}

    def read() -> tuple[SamplingParams, Conversation, dict[str, Any]]:
        return body.sampling(generation.sampling_defaults, **own), body.conversation(), body.options()

    sampling, conversation, shared = await off_loop(request, read)
    head = Head(f"resp_{request_id}", served.model_info.name)
    writer = ResponseWriter(head, body, sampling, generation.token_bytes)

    async def prepared(timeout_s: float) -> EngineRequest:
        return await generation.prepare(
            GenerationRequest(
                request_id=request_id,
                prompt=conversation,
                sampling=sampling,
                timeout_s=timeout_s,
                gathered=1,  # a stream's last event has all of it, too
                **shared,
            )
        )

    async def whole(timeout_s: float) -> dict[str, Any]:
        engine_request = await prepared(timeout_s)
        usage, chunks = usage_of([engine_request]), []
        async with aclosing(generation.run(engine_request, conversation)) as parts:
            async for chunk in parts:
                usage.add(chunk)
                chunks.append(chunk)
        return await generation.intake.call(held_bytes(chunks), writer.whole, chunks, usage)

    async def events(timeout_s: float) -> AsyncGenerator[bytes, None]:
        engine_request = await prepared(timeout_s)
        usage, begun = usage_of([engine_request]), False
        async with aclosing(generation.run(engine_request, conversation)) as parts:
            async for chunk in parts:
                usage.add(chunk)
                opening = [] if begun else writer.opening()
                begun = True
                if written := [*opening, *writer.part(chunk)]:
                    yield b"".join(map(sse.named_event, written))
        yield b"".join(map(sse.named_event, writer.closing(usage)))

    return StreamCall(door, request_id, events, writer.failure) if body.stream else WholeCall(door, request_id, whole)

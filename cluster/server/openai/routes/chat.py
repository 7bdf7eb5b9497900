"""/v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from cluster.api import EngineRequest
from cluster.generation.conversations import Conversation
from cluster.generation.text_generation import GenerationRequest
from cluster.server.openai.answers.chat import ChatWriter
from cluster.server.openai.answers.parts import Head
from cluster.server.openai.bounded_route import BoundedRoute, off_loop
from cluster.server.openai.call import StreamCall, WholeCall
from cluster.server.openai.door import door_of
from cluster.server.openai.request_id import request_id_of
from cluster.server.openai.requests.chat import ChatCompletionRequest
from cluster.server.openai.requests.sampling import check_stream_options
from cluster.server.openai.requests.unsupported import check_best_of, check_fields
from cluster.server.openai.routes.answering import answer, stream
from workers.sampling_params import SamplingParams

router = APIRouter(route_class=BoundedRoute)


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
    """Go on with a conversation."""
    door = door_of(request)
    served, request_id = door.served, request_id_of(request)
    check_fields(body)
    n = body.n or 1
    check_best_of(body.best_of, n)
    options = check_stream_options(body.stream, body.stream_options)
    generation = served.generation
    own = {"max_tokens": body.longest, "logprobs": body.num_logprobs, "prompt_logprobs": body.prompt_logprobs, "n": n}

    def read() -> tuple[SamplingParams, Conversation, dict[str, Any]]:
        return body.sampling(generation.sampling_defaults, **own), body.conversation(), body.options()

    sampling, conversation, shared = await off_loop(request, read)

    async def prepared(timeout_s: float) -> tuple[EngineRequest, ChatWriter]:
        engine_request = await generation.prepare(
            GenerationRequest(
                request_id=request_id,
                prompt=conversation,
                sampling=sampling,
                timeout_s=timeout_s,
                gathered=0 if body.stream else n,
                **shared,
            )
        )
        head = Head(f"chatcmpl-{request_id}", served.model_info.name)
        prompt = engine_request.prompt_token_ids.tolist() if body.return_token_ids else []
        return engine_request, ChatWriter(head, body, prompt, generation.token_bytes)

    async def whole(timeout_s: float) -> dict[str, Any]:
        engine_request, writer = await prepared(timeout_s)
        return await answer(generation, [engine_request], n, writer, conversation)

    async def events(timeout_s: float) -> AsyncGenerator[bytes, None]:
        engine_request, writer = await prepared(timeout_s)
        async for event in stream(generation, [engine_request], n, writer, options, conversation):
            yield event

    return StreamCall(door, request_id, events) if body.stream else WholeCall(door, request_id, whole)

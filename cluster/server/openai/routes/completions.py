"""/v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from cluster.api import EngineRequest
from cluster.generation.text_generation import GenerationRequest
from cluster.server.openai.answers.completion import CompletionWriter
from cluster.server.openai.answers.parts import Head
from cluster.server.openai.bounded_route import BoundedRoute, off_loop
from cluster.server.openai.call import StreamCall, WholeCall
from cluster.server.openai.door import Served, door_of
from cluster.server.openai.request_id import request_id_of
from cluster.server.openai.requests.completion import DEFAULT_MAX_TOKENS, CompletionRequest
from cluster.server.openai.requests.sampling import check_stream_options
from cluster.server.openai.requests.unsupported import check_best_of, check_fields
from cluster.server.openai.routes.answering import answer, stream
from workers.errors import InvalidRequestError
from workers.sampling_params import SamplingParams
from workers.token_ids import TokenIds, as_token_ids

router = APIRouter(route_class=BoundedRoute)
MAX_CHOICES = 1024
"""Answers of one request, to all its prompts together."""


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue prompts."""
    door = door_of(request)
    served, request_id = door.served, request_id_of(request)
    _check(body)
    options = check_stream_options(body.stream, body.stream_options)
    n = body.n or 1

    def read() -> tuple[SamplingParams, list[str | TokenIds]]:
        return _sampling(body, served), [each if isinstance(each, str) else as_token_ids(each) for each in body.prompts]

    sampling, prompts = await off_loop(request, read)

    async def prepared(timeout_s: float) -> tuple[list[EngineRequest], CompletionWriter]:
        requests = await _prepare(body, sampling, prompts, served, request_id, timeout_s)
        tokens = [each.prompt_token_ids.tolist() for each in requests]
        head = Head(f"cmpl-{request_id}", served.model_info.name)
        echoes = await _echoes(body, served) if body.echo else []
        return requests, CompletionWriter(head, body, tokens, echoes, served.generation.token_bytes)

    async def whole(timeout_s: float) -> dict[str, Any]:
        requests, writer = await prepared(timeout_s)
        return await answer(served.generation, requests, n, writer)

    async def events(timeout_s: float) -> AsyncGenerator[bytes, None]:
        requests, writer = await prepared(timeout_s)
        async for event in stream(served.generation, requests, n, writer, options):
            yield event

    return StreamCall(door, request_id, events) if body.stream else WholeCall(door, request_id, whole)


def _check(body: CompletionRequest) -> None:
    check_fields(body)
    n = body.n or 1
    check_best_of(body.best_of, n)
    if len(body.prompts) * n > MAX_CHOICES:
        raise InvalidRequestError(
            f"{len(body.prompts)} prompts with n {n} are {len(body.prompts) * n} answers, at most {MAX_CHOICES} are "
            "allowed in one request"
        )


def _sampling(body: CompletionRequest, served: Served) -> SamplingParams:
    defaults = {"max_tokens": DEFAULT_MAX_TOKENS, **served.generation.sampling_defaults}
    own = {"max_tokens": body.max_tokens, "logprobs": body.logprobs, "prompt_logprobs": body.num_prompt_logprobs}
    return body.sampling(defaults, **own, n=body.n)


async def _prepare(
    body: CompletionRequest,
    sampling: SamplingParams,
    prompts: Sequence[str | TokenIds],
    served: Served,
    request_id: str,
    timeout_s: float,
) -> list[EngineRequest]:
    return [
        await served.generation.prepare(
            GenerationRequest(
                request_id=request_id,
                prompt=prompt,
                sampling=sampling,
                timeout_s=timeout_s,
                gathered=0 if body.stream else len(body.prompts) * (body.n or 1),
                **body.options(),
            )
        )
        for prompt in prompts
    ]


async def _echoes(body: CompletionRequest, served: Served) -> list[str]:
    return [
        prompt if isinstance(prompt, str) else await served.generation.text_of(as_token_ids(prompt))
        for prompt in body.prompts
    ]

"""/tokenize and /detokenize."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from cluster.server.openai.bounded_route import BoundedRoute, off_loop
from cluster.server.openai.call import WholeCall
from cluster.server.openai.door import door_of
from cluster.server.openai.request_id import request_id_of
from cluster.server.openai.requests.tokens import DetokenizeRequest, TokenizeChatRequest, TokenizeRequest
from cluster.server.openai.requests.unsupported import check_fields
from workers.token_ids import as_token_ids

router = APIRouter(route_class=BoundedRoute)


@router.post("/tokenize")
async def tokenize(body: TokenizeChatRequest | TokenizeRequest, request: Request) -> Response:
    """Turn a prompt into token ids, as it would be for an answer."""
    door = door_of(request)
    served = door.served
    check_fields(body)
    prompt = body.prompt if isinstance(body, TokenizeRequest) else await off_loop(request, body.conversation)

    generation = served.generation

    async def work(timeout_s: float) -> dict[str, Any]:
        token_ids = await generation.tokenize(prompt, body.model or "", body.add_special_tokens)
        tokens = token_ids.tolist()
        names = None
        if body.return_token_strs:
            names = await generation.intake.call(8 * len(tokens), lambda: [*map(generation.token_name, tokens)])
        answer = {"count": len(tokens), "max_model_len": served.model_info.max_model_len, "tokens": tokens}
        return {**answer, "token_strs": names}

    return WholeCall(door, request_id_of(request), work)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """Turn token ids into their text, special tokens as they are spelled."""
    door = door_of(request)
    served = door.served
    check_fields(body)
    token_ids = await off_loop(request, partial(as_token_ids, body.tokens))

    async def work(timeout_s: float) -> dict[str, Any]:
        return {"prompt": await served.generation.detokenize(token_ids, body.model or "")}

    return WholeCall(door, request_id_of(request), work)

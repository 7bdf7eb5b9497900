"""/v1/models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from cluster.errors import ModelNotFoundError
from cluster.server.openai.door import Served, served_of

router = APIRouter()


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The served model, as a list."""
    return {"object": "list", "data": [_model(served_of(request))]}


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> dict[str, Any]:
    """The served model, by its name."""
    served = served_of(request)
    if name != served.model_info.name:
        raise ModelNotFoundError(f"model {name!r} is not served here; this server serves {served.model_info.name!r}")
    return _model(served)


def _model(served: Served) -> dict[str, Any]:
    info = served.model_info
    return {
        "id": info.name,
        "object": "model",
        "created": served.since,
        "owned_by": "baton",
        "root": info.name,
        "parent": None,
        "max_model_len": info.max_model_len,
        "permission": [],
    }

"""/health, /ready and /version."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from cluster.server.openai.door import door_of
from cluster.server.openai.json_bytes import json_bytes

router = APIRouter()


@router.get("/health")
async def health() -> dict[str, Any]:
    """Liveness: the process answers."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Readiness: a request that comes now is likely to be answered; 503 with the reason if not."""
    found = door_of(request).health
    content = {"ready": found.ready, "reason": found.reason, "groups": dict(found.groups)}
    return Response(json_bytes(content), 200 if found.ready else 503, media_type="application/json")


@router.get("/version")
async def version() -> dict[str, Any]:
    """Baton's."""
    try:
        return {"version": importlib.metadata.version("baton")}
    except importlib.metadata.PackageNotFoundError:
        return {"version": "unknown"}

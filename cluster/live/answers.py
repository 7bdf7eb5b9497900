"""What a browser, Prometheus or `baton top` asks over HTTP, whatever server carries it."""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import Any

from cluster.api import Explanation, ModelInfo
from cluster.gateway.engine import ServingEngine
from cluster.gateway.readiness import Readiness
from cluster.generation.text_generation import Generation, GenerationRequest
from cluster.live.answer import Answer
from cluster.live.history import LiveHistory
from cluster.live.page_files import page_file, page_paths
from cluster.live.snapshot import snapshot
from cluster.metrics.registry import MetricsRegistry
from workers.errors import BatonError, InvalidRequestError
from workers.sampling_params import SamplingParams

_EXPLAIN_TIMEOUT_S = 10.0


class Answers:
    """The paths that there are: /, /live.json, /metrics and /explain, and the page's own files.

    Args:
        engine: the service's.
        generation: takes prompts to explain.
        model: the served one.
        readiness: whether it can answer.
        history: of the last minutes.
        metrics: of the service.
    """

    def __init__(
        self,
        engine: ServingEngine,
        generation: Generation,
        model: ModelInfo,
        readiness: Readiness,
        history: LiveHistory,
        metrics: MetricsRegistry,
    ) -> None:
        self._engine, self._generation, self._model = engine, generation, model
        self._readiness, self._history, self._metrics = readiness, history, metrics
        self._by_path: dict[tuple[str, str], Callable[[Mapping[str, str], bytes], Awaitable[Answer]]] = {
            ("GET", "/metrics"): self._exposition,
            ("GET", "/live.json"): self._live,
            ("POST", "/explain"): self._explain,
        }

    async def respond(self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> Answer:
        """Answer one request; arguments as of `Responder.respond`."""
        asked = "GET" if method == "HEAD" else method
        if asked == "GET" and (page := page_file(path)) is not None:
            return page
        found = self._by_path.get((asked, path))
        if found is not None:
            return await found(headers, body)
        paths = [*self._by_path, *(("GET", own) for own in page_paths())]
        allowed = [known for known, known_path in paths if known_path == path]
        if allowed:
            return Answer(405, b"", {"allow": ", ".join(allowed)})
        return Answer(404, b"there is nothing here; see /, /metrics or /live.json\n", {"content-type": "text/plain"})

    async def _exposition(self, headers: Mapping[str, str], body: bytes) -> Answer:
        content_type, text = self._metrics.exposition()
        return Answer(200, text, {"content-type": content_type})

    async def _live(self, headers: Mapping[str, str], body: bytes) -> Answer:
        return _json(200, snapshot(self._engine, self._history, self._model, self._readiness))

    async def _explain(self, headers: Mapping[str, str], body: bytes) -> Answer:
        """Where a prompt would go; the body is JSON with `prompt`, a text, and perhaps `max_tokens`."""
        try:
            explanation = await self._generation.explain(_question(body))
        except InvalidRequestError as error:
            return _json(400, {"error": str(error)})
        except BatonError as error:
            return _json(503, {"error": str(error)})
        return _json(200, _shown(explanation))


def _question(body: bytes) -> GenerationRequest:
    try:
        asked = json.loads(body)
        prompt, max_tokens = asked["prompt"], asked.get("max_tokens")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidRequestError('the body must be JSON such as {"prompt": "…", "max_tokens": 64}') from error
    if not isinstance(prompt, str) or not isinstance(max_tokens, int | None):
        raise InvalidRequestError("prompt must be a text, and max_tokens a whole number")
    sampling = SamplingParams(max_tokens=max_tokens)
    return GenerationRequest(request_id="explain", sampling=sampling, timeout_s=_EXPLAIN_TIMEOUT_S, prompt=prompt)


def _shown(explanation: Explanation) -> dict[str, Any]:
    pairs = [asdict(pair) for pair in explanation.pairs]
    return {"prompt_tokens": explanation.prompt_tokens, "max_tokens": explanation.max_tokens, "pairs": pairs}


def _json(status: int, value: Any) -> Answer:
    headers = {"content-type": "application/json", "cache-control": "no-store"}
    return Answer(status, json.dumps(_finite(value), allow_nan=False).encode(), headers)


def _finite(value: Any) -> Any:
    """The same without infinity and NaN, which JSON does not have: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list) else value

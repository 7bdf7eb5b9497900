"""One line a request, at its end: who it was, where it went, how long it took, how it ended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from cluster.api import EngineRequest
from cluster.clock import now
from cluster.gateway.attempt import Attempt
from cluster.gateway.observers import EngineObserver
from cluster.request_id import MAX_LOGGED_ERROR, one_line
from workers.token_ids import TokenIds

_REPORT_PATIENCE_S = 0.3
"""A little more than an attempt is kept for the report of its handoff."""


class RequestLines(EngineObserver):
    """Logs each request when it has ended.

    Args:
        logger: takes the lines, at the level INFO; what is structured is in `extra`.
        decode: turns a prompt's tokens into text, to log it; None: prompts are not logged.
    """

    def __init__(self, logger: logging.Logger, decode: Callable[[TokenIds], str] | None = None) -> None:
        self._logger = logger
        self._decode = decode

    def request_finished(self, request: EngineRequest, attempt: Attempt) -> None:
        """See `EngineObserver.request_finished`; the report of its handoff may come a moment later."""
        outcome = attempt.finish_reason.value if attempt.finish_reason is not None else "stop"
        total_s = now() - attempt.arrived
        if attempt.reported:
            self._log(request, attempt, outcome, total_s)
        else:
            loop = asyncio.get_running_loop()
            loop.call_later(_REPORT_PATIENCE_S, self._log, request, attempt, outcome, total_s)

    def request_cancelled(self, request: EngineRequest, attempt: Attempt | None) -> None:
        """See `EngineObserver.request_cancelled`."""
        self._log(request, attempt, "abort", now() - attempt.arrived if attempt is not None else None)

    def request_failed(self, request: EngineRequest, attempt: Attempt | None, error: Exception) -> None:
        """See `EngineObserver.request_failed`."""
        total_s = now() - attempt.arrived if attempt is not None else None
        self._log(request, attempt, "error", total_s, error)

    def _log(
        self,
        request: EngineRequest,
        attempt: Attempt | None,
        outcome: str,
        total_s: float | None,
        error: Exception | None = None,
    ) -> None:
        if not self._logger.isEnabledFor(logging.INFO):
            return
        fields = _fields(request, attempt, outcome, total_s, error)
        if self._decode is not None:
            fields["prompt"] = self._decode(request.prompt_token_ids)
        self._logger.info("%s", _sentence(fields), extra=fields)


def _fields(
    request: EngineRequest, attempt: Attempt | None, outcome: str, total_s: float | None, error: Exception | None
) -> dict[str, Any]:
    """Times in seconds."""
    fields: dict[str, Any] = {
        "request_id": request.request_id,
        "user": request.user,
        "outcome": outcome,
        "prompt_tokens": len(request.prompt_token_ids),
        "output_tokens": 0,
        "total_s": None if total_s is None else round(total_s, 6),
    }
    if attempt is not None:
        report = attempt.report()
        fields |= {
            "output_tokens": max(0, attempt.num_tokens - len(request.prompt_token_ids)),
            "attempt_id": attempt.attempt_id,
            "attempts": report.attempts,
            "prefill_worker": report.prefill_worker,
            "decode_worker": report.decode_worker,
            "cached_tokens": report.cached_tokens,
            "kv_bytes": report.kv_bytes,
            "ttft_s": round(report.ttft_s, 6) if attempt.first_token_at else None,
            "queue_s": round(report.queue_s, 6),
            "prefill_s": round(report.prefill_s, 6),
            "transfer_s": round(report.transfer_s, 6),
            "exposed_transfer_s": round(report.exposed_transfer_s, 6),
            "first_decode_s": round(report.first_decode_s, 6),
        }
    if error is not None:
        fields["error"] = one_line(f"{type(error).__name__}: {error}", MAX_LOGGED_ERROR)
    return fields


def _sentence(fields: dict[str, Any]) -> str:
    """The same for people; prompts follow as Python writes texts, on the same line."""
    parts = [f"request {fields['request_id']}: {fields['outcome']}"]
    parts += [f"user {fields['user']!r}"] if fields["user"] else []
    parts.append(f"{fields['prompt_tokens']} + {fields['output_tokens']} tokens")
    if "prefill_worker" in fields:
        places = [fields[name] for name in ("prefill_worker", "decode_worker") if fields[name]]
        parts.append(" → ".join(places))
        if fields["ttft_s"] is not None:
            spans = [(name, fields[f"{name}_s"]) for name in ("queue", "prefill", "exposed_transfer")]
            inner = ", ".join(f"{name.partition('_')[0]} {value * 1e3:.1f}" for name, value in spans)
            parts.append(f"first token {fields['ttft_s'] * 1e3:.1f} ms ({inner})")
        if fields["attempts"] > 1:
            parts.append(f"{fields['attempts']} attempts")
    if fields["total_s"] is not None:
        parts.append(f"{fields['total_s'] * 1e3:.1f} ms in all")
    parts += [fields["error"]] if "error" in fields else []
    parts += [f"prompt {fields['prompt']!r}"] if "prompt" in fields else []
    return ", ".join(parts)

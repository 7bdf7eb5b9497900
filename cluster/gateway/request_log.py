"""What a log says of requests: by their clients' names, and which attempt it is about."""

from __future__ import annotations

import logging

from cluster.api import EngineRequest
from cluster.gateway.attempt import Attempt
from cluster.gateway.observers import EngineObserver
from cluster.request_id import MAX_LOGGED_ERROR, one_line
from workers.errors import BatonError

logger = logging.getLogger(__name__)


class RequestLog(EngineObserver):
    """Logs where requests go and how they end; what goes well is for debugging."""

    def request_placed(self, request: EngineRequest, attempt: Attempt) -> None:
        """See `EngineObserver.request_placed`."""
        where = (attempt.prefill or "no prefill worker", attempt.decode or "no decode worker")
        logger.debug("request %s (attempt %s) goes to %s and %s", request.request_id, attempt.attempt_id, *where)

    def request_migrated(self, attempt: Attempt, error: Exception) -> None:
        """See `EngineObserver.request_migrated`."""
        logger.info(
            "request %s (attempt %s) goes on elsewhere: %s", attempt.request_id, attempt.attempt_id, _said(error)
        )

    def request_finished(self, request: EngineRequest, attempt: Attempt) -> None:
        """See `EngineObserver.request_finished`."""
        logger.debug("request %s (attempt %s) is finished", request.request_id, attempt.attempt_id)

    def request_cancelled(self, request: EngineRequest, attempt: Attempt | None) -> None:
        """See `EngineObserver.request_cancelled`."""
        logger.debug("request %s (attempt %s) was closed", request.request_id, _name(attempt))

    def request_failed(self, request: EngineRequest, attempt: Attempt | None, error: Exception) -> None:
        """See `EngineObserver.request_failed`; what is no `BatonError` is a defect."""
        level = logging.INFO if isinstance(error, BatonError) else logging.ERROR
        names = (request.request_id, _name(attempt))
        logger.log(level, "request %s (attempt %s) failed: %s: %s", *names, type(error).__name__, _said(error))


def _said(error: Exception) -> str:
    return one_line(str(error), MAX_LOGGED_ERROR)


def _name(attempt: Attempt | None) -> str:
    return "none" if attempt is None else attempt.attempt_id

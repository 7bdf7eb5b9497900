"""What a request is called: by its client in a header, or by a made-up name."""

from __future__ import annotations

import uuid

from starlette.requests import Request

from cluster.request_id import check_name, clean_request_id

HEADER = "x-request-id"


def request_id_of(request: Request) -> str:
    """Fit for logs.

    Raises:
        InvalidRequestError: the client's name for it is too long.
    """
    given = check_name(HEADER, request.headers.get(HEADER, ""))
    return clean_request_id(given) or uuid.uuid4().hex

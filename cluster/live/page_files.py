"""The page itself: its files as they are answered, read once."""

from __future__ import annotations

from functools import cache
from importlib import resources

from cluster.live.answer import Answer

_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/charts.js": ("charts.js", "text/javascript; charset=utf-8"),
}
_STYLESHEET = b'<link rel="stylesheet" href="page.css">'
_SAFE = {
    "content-security-policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


@cache
def page_file(path: str) -> Answer | None:
    """What is answered to a GET of this path; None: it is none of the page's.

    The document has its style sheet inside, so that the first answer is all that the first paint needs.
    """
    if path not in _FILES:
        return None
    name, content_type = _FILES[path]
    content = _content(name)
    if path == "/":
        content = content.replace(_STYLESHEET, b"<style>\n" + _content("page.css") + b"</style>")
    return Answer(200, content, {"content-type": content_type, **_SAFE})


def page_paths() -> tuple[str, ...]:
    """Every path of the page's own."""
    return tuple(_FILES)


def _content(name: str) -> bytes:
    return resources.files("cluster.live").joinpath("page", name).read_bytes()

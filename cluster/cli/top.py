"""`baton top`: what the live page shows, in a terminal."""

from __future__ import annotations

import argparse
import json
import time
import urllib.error
import urllib.request
from typing import Any

from workers.errors import ConfigError

_DEFAULT_URL = "http://127.0.0.1:50052"
_TIMEOUT_S = 5.0
_EPILOG = """\
The same as the page that `baton up` names when it has started, and from the same server (metrics.host, metrics.port).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.description = "Follow a service: pools, workers, latency, goodput, and requests with why they are there."
    parser.epilog = _EPILOG
    parser.add_argument("--url", default=_DEFAULT_URL, help="of the page (default: %(default)s)")
    parser.add_argument(
        "--interval", type=float, default=1.0, metavar="S", help="from look to look (default %(default)s)"
    )
    parser.add_argument("--once", action="store_true", help="show it once and exit")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from rich.console import Console
    from rich.live import Live

    from cluster.cli.top_view import view

    console = Console()
    if args.once:
        console.print(view(look(args.url), console.width, None))
        return 0
    live_state = look(args.url)  # what is wrong with the address is said before the screen is taken
    with Live(console=console, screen=True, auto_refresh=False) as screen:
        while True:
            screen.update(view(live_state, console.width, console.height), refresh=True)
            time.sleep(args.interval)
            live_state = _look_again(args.url, live_state)


def look(url: str) -> dict[str, Any]:
    """How the service is.

    Raises:
        ConfigError: nobody answers there, or something else does.
    """
    address = f"{url.rstrip('/')}/live.json"
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"--url {url} must begin with http:// or https://")
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as answer:
            found = json.load(answer)
    except urllib.error.HTTPError as error:
        if step := _starting(error):
            raise ConfigError(f"the service is starting: {step}") from error
        raise ConfigError(f"{address} answers {error.code}: is that Baton's page?") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(f"cannot read {address}: {reason}; `baton up` names the page's address") from error
    if not isinstance(found, dict) or "workers" not in found:
        raise ConfigError(f"{address} is not Baton's")
    return found


def _starting(error: urllib.error.HTTPError) -> str:
    """What a service that is starting says that it is at; empty: it is something else that has answered."""
    try:
        said = json.load(error)
    except ValueError:
        return ""
    step = said.get("starting") if isinstance(said, dict) else None
    return step if isinstance(step, str) else ""


def _look_again(url: str, before: dict[str, Any]) -> dict[str, Any]:
    """How it is now; if nobody answers, as it was, and that."""
    try:
        return look(url)
    except ConfigError as error:
        starting = str(error) if isinstance(error.__cause__, urllib.error.HTTPError) else ""
        reason = starting or "the gateway does not answer; trying again"
        return {**before, "health": {"ready": False, "reason": reason}}

"""`baton scale`: how many workers the pools are to have."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from cluster.cli.connection import add_connection_arguments, connection_of
from cluster.client.client import BatonClient
from workers.errors import InvalidRequestError

_EPILOG = """\
Requests go on meanwhile and none fails because of it: a new worker gets requests once it has loaded, measured itself
and met its peers; a worker that leaves finishes what it has, and after drain_timeout_s hands it on. `baton status`
shows how far it is. A pool has min_replicas workers at least and max_replicas at most. In a pool of several groups each
group has numbers of its own.

examples:
  baton scale prefill=2 decode=3
  baton scale decode=1
  baton scale decode.h100=2        the group h100 of the decode pool
  baton scale                      show the targets
"""
_TIMEOUT_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.description = "Have pools grow or shrink to so many workers, and return at once."
    parser.epilog = _EPILOG
    parser.add_argument("targets", nargs="*", metavar="POOL[.GROUP]=N", help="prefill or decode, and its workers")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    add_connection_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    targets = parse_targets(args.targets)
    with BatonClient(connection_of(args)) as client:
        pools = client.scale(targets, _TIMEOUT_S)
    if args.json:
        print(json.dumps([asdict(pool) for pool in pools], indent=2))
    else:
        for pool in pools:
            print(f"{pool.key}: {pool.target} workers (from {pool.min_replicas} to {pool.max_replicas})")
    return 0


def parse_targets(settings: Sequence[str]) -> dict[str, int]:
    """What `prefill=2 decode.h100=3` says.

    Raises:
        InvalidRequestError: something else is said, or something twice.
    """
    targets: dict[str, int] = {}
    for setting in settings:
        pool, _, number = setting.partition("=")
        if not pool or not number.isdecimal():
            raise InvalidRequestError(f"{setting!r} must be POOL=N or POOL.GROUP=N, such as decode=3")
        if pool in targets:
            raise InvalidRequestError(f"{pool} is given twice")
        targets[pool] = int(number)
    return targets

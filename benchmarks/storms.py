"""What storms leave behind: clients that leave at once, bursts, overload, long use; and what the service holds then.

The real service, its Ray actors and NIXL, with the recall model, whose right answers are known. Before and after each
storm it is looked at while nobody asks anything: resident memory, descriptors and threads of every process, blocks that
are not free, and the gateway's books (calls, queue, attempts, bookings of workers, suspects, tenants' accounts, and how
many objects there are of each of Baton's types). A small storm of the same kind goes before, so that what is made once
is there.

Each may be run alone (`python -m benchmarks.storms abort burst`), and takes the place of the one before in the result
file.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, Environment
from benchmarks.faults.served import Served, served
from benchmarks.markdown import read_result
from benchmarks.report import to_json, write_json
from benchmarks.storm_loads.loads import abort_storm, burst, overload, soak
from benchmarks.storm_loads.state import growth, state, wait_until_idle
from cluster.client.client import AsyncBatonClient, Connection

STORMS = ("abort", "burst", "overload", "soak")
SETTINGS = {
    "server.port": 0,
    "server.max_queue": 2000,
    "metrics.port": 0,
    "logging.requests": "false",
    "prefill.num_blocks": 1024,
    "decode.num_blocks": 2048,
    "prefill.num_cpus": 0.5,
    "decode.num_cpus": 0.5,
}
ALL_MAY_WAIT = {"server.max_queue_wait_s": 600}
"""Where all clients are to be let in: who would wait longer than 30 s is refused by default."""
_SETTLE_S = 2.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 1: an answer was wrong, or a block is missing."""
    parser = argparse.ArgumentParser("storms", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("storms", nargs="*", metavar="STORM", help=f"of {', '.join(STORMS)}; default: all")
    parser.add_argument("--soak-s", type=float, default=1200.0, metavar="S", help="of the soak; default: %(default)s")
    parser.add_argument("--overload-s", type=float, default=300.0, metavar="S", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS / "storms.json", metavar="FILE")
    args = parser.parse_args(argv)
    if unknown := set(args.storms) - set(STORMS):
        parser.error(f"no storm is called {', '.join(sorted(unknown))}")
    failed = False
    for name in args.storms or STORMS:
        result = asyncio.run(run_storm(name, args.soak_s, args.overload_s, lambda line: print(line, flush=True)))
        failed |= bool(result["wrong"] or result["after"]["blocks_missing"])
        _merge(args.output, result)
    return int(failed)


async def run_storm(name: str, soak_s: float, overload_s: float, tell: Any) -> dict[str, Any]:
    """One storm, on a service of its own."""
    environment = Environment.capture(None).to_json()
    with (
        tempfile.TemporaryDirectory(prefix="baton-storm-", ignore_cleanup_errors=True) as folder,
        served(Path(folder) / "service", {**SETTINGS, **_patience(name)}, {}) as service,
        ExitStack() as stack,
    ):
        addresses = await service.wait()
        tell(f"{name}: serving on {addresses['grpc']}")
        stack.push(lambda kind, error, trace: tell(service.process.tail()) if error else None)
        async with AsyncBatonClient(Connection(addresses["grpc"])) as client:
            await _storm(name, service, client, addresses["http"], tell, small=True)
            before = await _at_rest(service)
            result = await _storm(name, service, client, addresses["http"], tell, soak_s=soak_s, overload_s=overload_s)
            after = await _at_rest(service)
    tell(f"{name}: {summary(before, after)}")
    return {"storm": name, "environment": environment, **result, "before": before, "after": after,
            "grown": growth(before, after)}  # fmt: skip


def _patience(name: str) -> dict[str, Any]:
    return ALL_MAY_WAIT if name in ("abort", "burst") else {}


async def _storm(
    name: str,
    service: Served,
    client: AsyncBatonClient,
    http_url: str,
    tell: Any,
    *,
    small: bool = False,
    soak_s: float = 0.0,
    overload_s: float = 0.0,
) -> dict[str, Any]:
    if name == "abort":
        return await abort_storm(service, client, tell, **({"rounds": 2} if small else {}))
    if name == "burst":
        return await burst(service, client, tell, **({"calls": 500} if small else {}))
    if name == "overload":
        return await overload(service, client, tell, 20.0 if small else overload_s)
    return await soak(service, client, tell, http_url, 30.0 if small else soak_s)


async def _at_rest(service: Served) -> dict[str, Any]:
    await wait_until_idle(service)
    await asyncio.sleep(_SETTLE_S)
    await wait_until_idle(service)  # a canary may have been under way
    return await state(service)


def summary(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What was held before and after, in a line."""
    told = [
        f"{name} {process['rss'] / 1e6:.0f} → {after['processes'][name]['rss'] / 1e6:.0f} MB, "
        f"{process['descriptors']} → {after['processes'][name]['descriptors']} descriptors"
        for name, process in before["processes"].items()
        if name in after["processes"]
    ]
    return "; ".join([*told, f"{after['blocks_missing']} blocks missing", f"grown: {growth(before, after)}"])


def _merge(output: Path, result: dict[str, Any]) -> None:
    known = {storm["storm"]: storm for storm in read_result(output)["storms"]} if output.exists() else {}
    known[result["storm"]] = result
    storms = [known[name] for name in STORMS if name in known]
    write_json(output, to_json("storms", Environment.capture(None), SETTINGS, {"storms": storms}))


if __name__ == "__main__":
    sys.exit(main())

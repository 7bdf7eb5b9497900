"""Baton and vLLM on the same GPUs, one engine after the other, in one start of the machine.

    python -m benchmarks.gpu_in_turns --vllm-path DIR --devices 0,1 --run NAME      1P1D on two GPUs, beside one
    python -m benchmarks.gpu_in_turns --vllm-path DIR --devices 0 --run NAME        1P1D on one card, beside one worker

Every engine has its services up at once, each with a KV cache of a given size: one GPU and 1P1D, so that prompts of one
length go to both in turn and drift counts for neither. What runs under load has the GPUs for itself, but for idle
services. First Baton: first requests of a new pair, single prompts, loads, goodput; then vLLM the same but for goodput,
its pair with NixlConnector and, if there is time, with NixlPushConnector; then goodput of two workers that do both, and
of a pair that chooses. Ends by itself when its time is up; every result file is written after each point.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import gpu_handoff, gpu_losing_case
from benchmarks.client_processes import ClientProcesses
from benchmarks.environment import RESULTS, Environment
from benchmarks.gpu_losing_case import SIDES, add_losing_arguments
from benchmarks.gpu_pool_ratio import config_of as pools_config_of
from benchmarks.llama_8b import save_shape
from benchmarks.peers import vllm_handoff
from benchmarks.report import to_json, write_json
from benchmarks.running_pools import RunningPools, add_window_arguments
from benchmarks.running_service import RunningService
from benchmarks.service_points import Turn, first_requests, length_result, line_of, measure_length, measure_loads
from cluster.client.client import AsyncBatonClient
from workers.errors import BatonError

PARTS = ("baton", "vllm", "goodput")
_SIDE_S, _LEAST_STEP_S, _POLL_S = 65.0, 3.0, 0.2
_INFO_TIMEOUT_S = 10.0
_POOLS = ("prefill", "decode")
_LOSING_FLAGS = (
    "devices", "dtype", "max_model_len", "max_num_batched_tokens", "max_num_seqs", "seconds", "window", "settle",
    "tries", "share", "clients", "seed", "set", "sides", "run", "note",
)  # fmt: skip
_TWO_CARDS = {"one": "1gpu", "pair": "2gpu", "push_pair": "push_2gpu", "undivided": "undivided"}
"""A service's name in the names of files that `benchmarks.gpu_handoff` and its peer write too."""
_NOT_KEPT = {"output_folder", "logs", "begin_when", "asked", "low", "single_kv_gb", "pair_kv_gb", "vllm_path"}
"""Folders of the machine, and what is said elsewhere."""
_PAIR_SETTINGS = (*(f"{key}={value}" for key, value in SIDES["always"].settings.items()),)
_UNDIVIDED_SETTINGS = ("router.disaggregation=never", "prefill.replicas=0", "decode.max_num_batched_tokens={}")


@dataclass
class Result:
    """A result file as it fills."""

    path: Path
    kind: str
    environment: Environment
    config: dict[str, Any]
    found: dict[str, Any] = field(default_factory=dict)

    def save(self) -> None:
        """Write it."""
        write_json(self.path, to_json(self.kind, self.environment, self.config, self.found))

    def report(self, line: str) -> None:
        """Write it, and say what has come in."""
        say(f"{self.path.stem}: {line}")
        self.save()


@dataclass(frozen=True)
class Up:
    """A service that is up, and its result."""

    service: RunningService
    result: Result
    args: argparse.Namespace


class Run:
    """What all parts share.

    Args:
        args: of the command line.
        folder: of the model.
    """

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.one_card = "," not in args.devices
        self.pair_devices = args.devices if not self.one_card else f"{args.devices},{args.devices}"
        self.until = time.perf_counter() + args.seconds
        self.environment = Environment.capture(threads=None)
        self.environ, _ = gpu_handoff.kernel_caches(args.kernel_cache and args.kernel_cache / "baton")
        self.losing = Result(
            args.output_folder / "gpu_losing_case.json",
            "gpu_losing_case",
            self.environment,
            dict(pools_config_of(argparse.Namespace(**{name: vars(args)[name] for name in _LOSING_FLAGS}))),
            gpu_losing_case.empty_result(args),
        )

    @property
    def left_s(self) -> float:
        """Of the time."""
        return float(self.until - time.perf_counter())

    async def step(self, name: str, limit_s: float, keep_s: float, work: Callable[[], Awaitable[None]]) -> bool:
        """Do one thing within its own time, and leave `keep_s` for what comes after; whether it was done."""
        limit_s = min(limit_s, self.left_s - keep_s)
        if limit_s < _LEAST_STEP_S:
            say(f"left out for want of time: {name}")
            return False
        began = time.perf_counter()
        try:
            async with asyncio.timeout(limit_s):
                await work()
        except (BatonError, TimeoutError) as error:
            say(f"{name} failed after {time.perf_counter() - began:.0f} s: {error or 'the time is over'}")
            return False
        say(f"{name}: {time.perf_counter() - began:.0f} s, {self.left_s:.0f} s left")
        return True

    @asynccontextmanager
    async def baton(self, name: str, devices: str, settings: Sequence[str] = ()) -> AsyncIterator[Up]:
        """A service of Baton's."""
        args = self._args_of(devices, settings)
        result = self._result(name, args, "baton")
        log = self.args.logs / f"baton_{name}.log"
        async with gpu_handoff.running_service(args, self.folder, self.environ, log, result.found) as service:
            yield Up(service, result, args)

    @asynccontextmanager
    async def vllm(self, name: str, devices: str, connector: str = "NixlConnector") -> AsyncIterator[Up]:
        """A service of vLLM's."""
        args = self._args_of(devices)
        args.set, args.connector = [], connector
        args.kernel_cache = args.kernel_cache and args.kernel_cache / f"vllm_{name}"
        result = self._result(name, args, "vllm")
        log = self.args.logs / f"vllm_{name}.log"
        async with vllm_handoff.running_service(args, self.folder, log, result.found) as service:
            yield Up(service, result, args)

    def _args_of(self, devices: str, settings: Sequence[str] = ()) -> argparse.Namespace:
        own = argparse.Namespace(**vars(self.args))
        own.devices = devices
        own.kv_cache_gb = self.args.pair_kv_gb if "," in devices else self.args.single_kv_gb
        sizes = [] if own.kv_cache_gb is None else [f"{pool}.kv_cache_gb={own.kv_cache_gb}" for pool in _POOLS]
        own.set = [*sizes, *settings, *self.args.set]
        return own

    def _result(self, name: str, args: argparse.Namespace, engine: str) -> Result:
        plain = argparse.Namespace(**{flag: value for flag, value in vars(args).items() if flag not in _NOT_KEPT})
        config = gpu_handoff.config_of(plain, engine, None)
        stem = f"gpu_one_card_{engine}_{name}" if self.one_card else f"gpu_service_{engine}_{_TWO_CARDS[name]}"
        return Result(self.args.output_folder / f"{stem}.json", "gpu_service", self.environment, config)


async def baton_part(run: Run) -> None:
    """The pair and one GPU: first requests, lengths; then the pair: loads, goodput."""
    first_gpu, *other_gpus = run.args.devices.split(",")
    async with AsyncExitStack() as stack, AsyncExitStack() as singles:
        (pair,) = await started(stack, run.baton("pair", run.args.devices, _PAIR_SETTINGS))
        await asyncio.to_thread(_wait_for, run.args.begin_when, run.left_s)
        settings = [text.format(run.args.max_num_batched_tokens) for text in _UNDIVIDED_SETTINGS]
        others = [run.baton("undivided", (other_gpus or [first_gpu])[0], settings)]
        others += [] if run.one_card else [run.baton("one", first_gpu)]
        undivided, one = [*await started(singles, *others), None][:2]
        await first_of(run, pair, one, undivided)
        turns = [(one, False), (pair, False), (pair, True), (undivided, False)]
        await run.step("Baton's lengths", 170.0, 0.0, partial(lengths, run.args, turns))
        await singles.aclose()
        if pair is not None:
            await run.step("Baton's loads", 80.0, 0.0, partial(loads, pair))
            if "always" in run.args.sides and "goodput" in run.args.parts:
                await run.step("goodput of 1P1D", _SIDE_S, 0.0, partial(pair_goodput, run, pair))


async def vllm_part(run: Run) -> None:
    """The pairs and one GPU: the same; with the push connector the lengths alone, and only if there is time for it."""
    keep_s = 2 * _SIDE_S if "goodput" in run.args.parts else 0.0
    async with AsyncExitStack() as stack, AsyncExitStack() as singles:
        (one,), (pull, push) = await asyncio.gather(
            started(singles, run.vllm("one", run.args.devices.split(",")[0])),
            started(
                stack,
                run.vllm("pair", run.pair_devices),
                run.vllm("push_pair", run.pair_devices, "NixlPushConnector"),
            ),
        )
        await first_of(run, one, pull, push)
        await run.step("vLLM's lengths", 120.0, 0.0, partial(lengths, run.args, [(one, False), (pull, False)]))
        await singles.aclose()
        if pull is not None:
            await run.step("vLLM's loads", 80.0, 0.0, partial(loads, pull))
        if push is not None:
            await run.step("the push connector's lengths", 60.0, keep_s, partial(lengths, run.args, [(push, False)]))
            await run.step("the push connector's loads", 80.0, keep_s, partial(loads, push))


async def goodput_part(run: Run) -> None:
    """Two workers that do both, and a pair that chooses; also the pair, if Baton's own part has not come to it."""
    have = {side["disaggregation"] for side in run.losing.found["sides"]}
    args = argparse.Namespace(**vars(run.args))
    args.sides = [name for name in run.args.sides if name not in have]
    args.seconds, args.kernel_cache = run.left_s, run.args.kernel_cache and run.args.kernel_cache / "baton"
    log = run.args.logs / "baton_goodput.log"
    await gpu_losing_case.measure(args, run.folder, log, run.losing.found, run.losing.save)


async def started(stack: AsyncExitStack, *services: Any) -> list[Up | None]:
    """Start services side by side; None in the place of one that did not start."""

    async def start(service: Any) -> Up | None:
        try:
            up: Up = await stack.enter_async_context(service)
        except BatonError as error:
            say(f"did not start: {error}")
            return None
        say(f"{up.result.path.stem} is ready after {up.result.found['ready_s']} s")
        return up

    return list(await asyncio.gather(*map(start, services)))


async def first_of(run: Run, *services: Up | None) -> None:
    """The first requests of new services, one after the other."""
    for up in services:
        if up is not None:
            await run.step(f"first requests of {up.result.path.stem}", 30.0, 0.0, partial(first, up))


async def first(up: Up) -> None:
    """The first requests of a new service. It may have waited: what it took from its start says nothing."""
    await first_requests(up.service.client, up.args, up.service.vocab_size, up.service.started, up.result.found)
    del up.result.found["first_token_s"]
    up.result.report(f"first requests' TTFT, s: {up.result.found['first']['ttft_s']}")


async def lengths(args: argparse.Namespace, turns: Sequence[tuple[Up | None, bool]]) -> None:
    """Prompts of every length to all services in turn.

    Args:
        args: of the command line.
        turns: services, as far as they have started, and whether their prompts are sent for a single token, which long
            ones are not.
    """
    up = [(service, alone) for service, alone in turns if service is not None]
    for length in args.lengths if up else ():
        here = [(service, alone) for service, alone in up if length <= args.long.above or not alone]
        asked = [Turn(service.service.client, alone) for service, alone in here]
        found = await measure_length(asked, length, args, here[0][0].service.vocab_size)
        single = {service.result.path: rows for (service, alone), rows in zip(here, found, strict=True) if alone}
        for (service, alone), rows in zip(here, found, strict=True):
            if not alone:
                result = length_result(length, rows, single.get(service.result.path, ()))
                service.result.found.setdefault("lengths", []).append(result)
                service.result.report(line_of(result))


async def loads(up: Up) -> None:
    """The Poisson loads."""
    service, result = up.service, up.result
    await measure_loads(service.client, up.args, service.vocab_size, service.max_model_len, result.report, result.found)


async def pair_goodput(run: Run, pair: Up) -> None:
    """The goodput of a pair that is up already."""
    service = pair.service
    assert isinstance(service.client, AsyncBatonClient)
    here: dict[str, Any] = {"split": str(SIDES["always"].split), "disaggregation": "always"}
    run.losing.found["sides"].append(here)
    workers = await service.client.workers(_INFO_TIMEOUT_S)
    with ClientProcesses(run.args.clients) as clients:
        pools = RunningPools(
            service.servers[0], service.address, service.client, clients, workers, service.vocab_size,
            pair.result.found["ready_s"],
        )  # fmt: skip
        until = time.perf_counter() + min(_SIDE_S, run.left_s) - _LEAST_STEP_S
        await gpu_losing_case.measure_side(pools, SIDES["always"], run.args, until, here, run.losing.save)


def _wait_for(path: Path | None, limit_s: float) -> None:
    until = time.perf_counter() + limit_s
    while path is not None and not path.exists() and time.perf_counter() < until:
        time.sleep(_POLL_S)


def say(line: str) -> None:
    """For people who watch."""
    print(line, file=sys.stderr, flush=True)


_PART = {"baton": baton_part, "vllm": vllm_part, "goodput": goodput_part}


async def measure(run: Run) -> None:
    """Every part, within the time; one that fails ends none of the others."""
    for name in run.args.parts:
        try:
            await _PART[name](run)
        except BatonError as error:
            say(f"{name} failed: {error}")
        say(f"{name} is done, {run.left_s:.0f} s left")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser("gpu_in_turns", description=__doc__.splitlines()[0] if __doc__ else "")
    gpu_handoff.add_arguments(parser)
    vllm_handoff.add_vllm_arguments(parser)
    add_window_arguments(parser, 700.0)
    add_losing_arguments(parser)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting of `baton up`")
    parser.add_argument("--vllm-path", type=Path, metavar="DIR", help="where vLLM is installed")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all of them")
    parser.add_argument("--single-kv-gb", type=float, metavar="GB", help="KV cache of each server on one GPU")
    parser.add_argument("--pair-kv-gb", type=float, metavar="GB", help="KV cache of each server of a pair")
    parser.add_argument("--begin-when", type=Path, metavar="FILE", help="is there: nothing is measured before")
    parser.add_argument("--output-folder", type=Path, default=RESULTS, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="of the servers; default: not kept")
    args = parser.parse_args(argv)
    if "vllm" in args.parts and args.vllm_path is None:
        parser.error("the part vllm needs --vllm-path")
    with tempfile.TemporaryDirectory() as scratch:
        args.logs = (args.logs or Path(scratch) / "logs").resolve()
        folder = args.model or save_shape(Path(scratch) / "llama-3.1-8b")
        asyncio.run(measure(Run(args, folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

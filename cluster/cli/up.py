"""`baton up`: the whole service in the foreground."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cluster.cli.foreign_flags import UpParser
from cluster.cli.stop_signals import StopSignals
from cluster.cli.welcome import welcome
from cluster.config.load import describe_settings, keep_grpc_out_of_forks, load_config
from cluster.config.schema import ServiceConfig
from cluster.errors import ServiceBrokenError
from cluster.live.starting import StartingAnswers
from cluster.logs.setup import log_to_stderr
from workers.errors import ConfigError

if TYPE_CHECKING:
    from cluster.gateway.readiness import Readiness
    from cluster.live.observed import Observed
    from cluster.server.doors import Doors

_EPILOG = """\
Settings come from the defaults, then the file, then the environment (BATON_SECTION__KEY, as in BATON_SERVER__PORT, and
BATON_ATTENTION_BACKEND for both pools), then the command line; the later one wins. A pool of unlike workers has groups:
decode.groups.NAME.KEY (BATON_DECODE__GROUPS__NAME__KEY) is a setting of one; what a group does not say is its pool's.

settings (section.key, default, meaning):
{settings}

examples:
  baton up --model ~/models/llama --prefill 2 --decode 1
  baton up --config service.yaml --set decode.max_num_seqs=128 --set server.auth_token_file=token.txt
"""


PARSER = UpParser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.description = (
        "Start Ray if needed, the workers, the gRPC server and OpenAI's HTTP server. Ctrl-C, SIGTERM or SIGHUP stops "
        "all of it when the requests under way are done (server.drain_timeout_s); a second one does not wait for them."
    )
    parser.epilog = _EPILOG.format(settings=describe_settings())
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings")
    parser.add_argument("--model", metavar="DIR|HUB_ID", help="checkpoint to serve (model.path)")
    parser.add_argument(
        "--address", metavar="HOST:PORT", help="Ray cluster to join; auto: this machine's (ray.address)"
    )
    parser.add_argument("--host", help="address to listen on (server.host)")
    parser.add_argument("--port", metavar="N", help="port to listen on (server.port)")
    parser.add_argument("--http-port", metavar="N", help="port of the HTTP server (server.http.port)")
    parser.add_argument("--prefill", metavar="N", help="prefill workers (prefill.replicas)")
    parser.add_argument("--decode", metavar="N", help="decode workers (decode.replicas)")
    parser.add_argument(
        "--tensor-parallel-size", metavar="N", help="ranks of a worker ({prefill,decode}.tensor_parallel_size)"
    )
    parser.add_argument(
        "--attention-backend", metavar="NAME", help="of both pools ({prefill,decode}.attention_backend)"
    )
    parser.add_argument("--load-format", metavar="NAME", help="dummy draws random weights (model.load_format)")
    parser.add_argument("--kv-cache-dtype", metavar="NAME", help="auto or fp8 ({prefill,decode}.kv_cache_dtype)")
    parser.add_argument(
        "--expert-weights", metavar="NAME", help="auto, mxfp4 or dequantized ({prefill,decode}.expert_weights)"
    )
    parser.add_argument(
        "--gpu-memory-utilization",
        metavar="SHARE",
        help="of a GPU, for each worker ({prefill,decode}.gpu_memory_utilization)",
    )
    parser.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs ({prefill,decode}.enforce_eager)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting; may be repeated")
    parser.add_argument("--check", action="store_true", help="say whether the settings are right, and start nothing")
    parser.add_argument("--verbose", action="store_true", help="log what happens inside (logging.level=info)")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    keep_grpc_out_of_forks()
    from cluster.server.doors import check_files

    config = load_config(args.config, overrides=overrides_of(args))
    if args.check:
        check_files(config.server)
        print("The settings are right.")
        return 0
    if args.verbose and config.logging.level in ("warning", "error"):
        config = replace(config, logging=replace(config.logging, level="info"))
    log_to_stderr(config.logging.level, config.logging.format, "gateway")
    asyncio.run(_until_signal(config))
    return 0


def overrides_of(args: argparse.Namespace) -> dict[str, str]:
    """The settings that the command line gives, `--set` over the named flags.

    Raises:
        ConfigError: a `--set` that is not KEY=VALUE.
    """
    flags = {
        "model.path": args.model,
        "model.load_format": args.load_format,
        "ray.address": args.address,
        "server.host": args.host,
        "server.port": args.port,
        "server.http.port": args.http_port,
        "prefill.replicas": args.prefill,
        "decode.replicas": args.decode,
        **_of_both_pools("tensor_parallel_size", args.tensor_parallel_size),
        **_of_both_pools("attention_backend", args.attention_backend),
        **_of_both_pools("kv_cache_dtype", args.kv_cache_dtype),
        **_of_both_pools("expert_weights", args.expert_weights),
        **_of_both_pools("gpu_memory_utilization", args.gpu_memory_utilization),
        **_of_both_pools("enforce_eager", "true" if args.enforce_eager else None),
    }
    overrides = {key: value for key, value in flags.items() if value is not None}
    for setting in args.set:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting} must be KEY=VALUE, such as --set server.port=50052")
        overrides[key.strip()] = value
    return overrides


def _of_both_pools(name: str, value: str | None) -> dict[str, str | None]:
    return {f"{pool}.{name}": value for pool in ("prefill", "decode")}


async def _until_signal(config: ServiceConfig) -> None:
    """Serve until a signal asks for the end; see `StopSignals`."""
    from rich.console import Console

    console = Console(stderr=True)
    serving = asyncio.current_task()
    assert serving is not None
    signals = StopSignals()

    def give_up_starting() -> None:
        signals.release()
        _tell(console, "Stopping; once more to stop at once.")
        serving.cancel()

    signals.on_request = give_up_starting
    signals.take()
    try:
        await _serve(config, console, signals)
    except asyncio.CancelledError:
        serving.uncancel()
    _tell(console, "Stopped.")


async def _serve(config: ServiceConfig, console: Any, signals: StopSignals) -> None:
    from cluster.server.doors import Doors, check_doors
    from cluster.server.pages.serve import page_warnings

    warnings = [*await check_doors(config.server), *page_warnings(config.metrics)]
    doors = Doors(config.server)
    await doors.open()
    try:
        async with _page(config, doors.port) as page:
            await _launch(config, doors, page, console, signals, warnings)
    finally:
        await doors.stop(grace_s=0)


async def _launch(
    config: ServiceConfig,
    doors: Doors,
    page: _Page,
    console: Any,
    signals: StopSignals,
    warnings: Sequence[str],
) -> None:
    """Start what is behind the doors, serve, and stop it."""
    from cluster.launch import launch
    from cluster.server.garbage_collector import settle

    loop, began = asyncio.get_running_loop(), time.monotonic()
    with console.status("Starting") as status:

        def report(step: str) -> None:
            console.print(f"{time.monotonic() - began:6.1f} s  {step}", markup=False, highlight=False, soft_wrap=True)
            status.update(step)
            page.answers.step = step
            asyncio.run_coroutine_threadsafe(doors.starting(step), loop)  # some steps are told by other threads

        async with launch(config, report) as service:
            stopping = asyncio.Event()
            signals.on_request = stopping.set
            service.broken.add_done_callback(lambda _: stopping.set())
            # Ray puts its own SIGTERM handler in place when it starts.
            signals.take()
            await doors.serve(service.generation, service.engine, service.model_info, service.readiness.health)
            following = asyncio.gather(service.readiness.run(), _follow(service.readiness, doors))
            with page.shows(service.observed):
                settle()
                status.stop()
                for warning in warnings:
                    console.print(f"warning: {warning}", style="yellow", markup=False)
                print(welcome(config, service.model_info, doors.address, doors.http_url, page.address), flush=True)
                await stopping.wait()
                broken = service.broken.result() if service.broken.done() else None
                if broken is not None:
                    _tell(console, broken[0].upper() + broken[1:] + ".")
                await _drain(doors, config.server.drain_timeout_s, console, signals)
            following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await following
            if broken is not None:
                raise ServiceBrokenError(broken)


@dataclass(frozen=True)
class _Page:
    """Page and metrics, which are served before there is anything to show.

    Attributes:
        address: the page's; None: neither is wanted.
        answers: what is answered.
    """

    address: str | None
    answers: StartingAnswers

    @contextlib.contextmanager
    def shows(self, observed: Observed | None) -> Iterator[None]:
        """Show a service that runs, until the block ends."""
        self.answers.running = None if observed is None else observed.answers
        try:
            yield
        finally:
            self.answers.running, self.answers.step = None, "it has stopped"


@contextlib.asynccontextmanager
async def _page(config: ServiceConfig, port: int) -> AsyncIterator[_Page]:
    """Serve page and metrics until the block ends, if they are wanted.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    from cluster.server.pages.serve import serve_pages

    answers = StartingAnswers()
    if not config.metrics.enabled:
        yield _Page(None, answers)
        return
    async with serve_pages(config.metrics, port, answers) as address:
        yield _Page(address, answers)


async def _follow(readiness: Readiness, doors: Doors) -> None:
    """Have health checks told how the service is, for ever."""
    async for found in readiness.follow():
        await doors.report(found)


async def _drain(doors: Doors, timeout_s: float, console: Any, signals: StopSignals) -> None:
    """Close the doors when the requests under way are done, when their time is over, or at once at a second signal."""
    _tell(
        console,
        f"Draining: new requests are refused, those under way have {timeout_s:g} s. Once more to stop at once.",
    )
    draining = asyncio.create_task(doors.drain(timeout_s))
    at_once = asyncio.create_task(signals.at_once.wait())
    await asyncio.wait({draining, at_once}, return_when=asyncio.FIRST_COMPLETED)
    for task in (draining, at_once):
        task.cancel()
    left = doors.num_calls
    if left:
        _tell(console, f"{left} {'request was' if left == 1 else 'requests were'} not finished and ended.")
    await doors.stop(grace_s=0)
    signals.release()


def _tell(console: Any, line: str) -> None:
    """Print a line where somebody may read it: the terminal may have been closed."""
    with contextlib.suppress(OSError):
        console.print(line, markup=False, highlight=False, soft_wrap=True)

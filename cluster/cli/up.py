"""`baton up`: the whole service in the foreground."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cluster.cli.stop_signals import StopSignals
from cluster.config.groups import groups_of
from cluster.config.load import describe_settings, load_config
from cluster.config.schema import ServiceConfig
from cluster.errors import ServiceBrokenError
from workers.errors import ConfigError

if TYPE_CHECKING:
    from cluster.gateway.readiness import Readiness
    from cluster.server.grpc.serve import Server

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.description = (
        "Start Ray if needed, the workers and the gRPC server. Ctrl-C, SIGTERM or SIGHUP stops all of it when the "
        "requests under way are done (server.drain_timeout_s); a second one does not wait for them."
    )
    parser.epilog = _EPILOG.format(settings=describe_settings())
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings")
    parser.add_argument("--model", metavar="DIR|HUB_ID", help="checkpoint to serve (model.path)")
    parser.add_argument(
        "--address", metavar="HOST:PORT", help="Ray cluster to join; auto: this machine's (ray.address)"
    )
    parser.add_argument("--host", help="address to listen on (server.host)")
    parser.add_argument("--port", metavar="N", help="port to listen on (server.port)")
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
        "--gpu-memory-utilization",
        metavar="SHARE",
        help="of a GPU, for each worker ({prefill,decode}.gpu_memory_utilization)",
    )
    parser.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs ({prefill,decode}.enforce_eager)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting; may be repeated")
    parser.add_argument("--check", action="store_true", help="say whether the settings are right, and start nothing")
    parser.add_argument("--verbose", action="store_true", help="log what happens inside")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from cluster.server.grpc.listen import check_access

    config = load_config(args.config, overrides=overrides_of(args))
    if args.check:
        check_access(config.server)
        groups_of(config)
        print("The settings are right.")
        return 0
    level = logging.INFO if args.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
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
        "prefill.replicas": args.prefill,
        "decode.replicas": args.decode,
        **_of_both_pools("tensor_parallel_size", args.tensor_parallel_size),
        **_of_both_pools("attention_backend", args.attention_backend),
        **_of_both_pools("kv_cache_dtype", args.kv_cache_dtype),
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
    from cluster.server.grpc.listen import check_server, exposure_warnings
    from cluster.server.grpc.serve import Server

    await check_server(config.server)
    server = Server(config.server)
    await server.open()
    try:
        await _launch(config, server, console, signals, exposure_warnings(config.server))
    finally:
        await server.stop(grace_s=0)


async def _launch(
    config: ServiceConfig, server: Server, console: Any, signals: StopSignals, warnings: Sequence[str]
) -> None:
    """Start what is behind the server, serve, and stop it."""
    from cluster.launch import launch
    from cluster.server.garbage_collector import settle

    loop, began = asyncio.get_running_loop(), time.monotonic()
    with console.status("Starting") as status:

        def report(step: str) -> None:
            console.print(f"{time.monotonic() - began:6.1f} s  {step}", markup=False, highlight=False, soft_wrap=True)
            status.update(step)
            asyncio.run_coroutine_threadsafe(server.starting(step), loop)  # some steps are told by other threads

        async with launch(config, report) as service:
            stopping = asyncio.Event()
            signals.on_request = stopping.set
            service.broken.add_done_callback(lambda _: stopping.set())
            # Ray puts its own SIGTERM handler in place when it starts.
            signals.take()
            await server.serve(service.generation, service.engine, service.model_info, service.readiness.health)
            following = asyncio.gather(service.readiness.run(), _follow(service.readiness, server))
            settle()
            status.stop()
            for warning in warnings:
                console.print(f"warning: {warning}", style="yellow", markup=False)
            print(_welcome(config, server.address, service.model_info), flush=True)
            await stopping.wait()
            broken = service.broken.result() if service.broken.done() else None
            if broken is not None:
                _tell(console, broken[0].upper() + broken[1:] + ".")
            await _drain(server, config.server.drain_timeout_s, console, signals)
            following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await following
            if broken is not None:
                raise ServiceBrokenError(broken)


async def _follow(readiness: Readiness, server: Server) -> None:
    """Have health checks told how the service is, for ever."""
    async for found in readiness.follow():
        await server.report(found)


async def _drain(server: Server, timeout_s: float, console: Any, signals: StopSignals) -> None:
    """Stop the server when the requests under way are done, when their time is over, or at once at a second signal."""
    _tell(
        console,
        f"Draining: new requests are refused, those under way have {timeout_s:g} s. Once more to stop at once.",
    )
    draining = asyncio.create_task(server.drain(timeout_s))
    at_once = asyncio.create_task(signals.at_once.wait())
    await asyncio.wait({draining, at_once}, return_when=asyncio.FIRST_COMPLETED)
    for task in (draining, at_once):
        task.cancel()
    left = server.num_calls
    if left:
        _tell(console, f"{left} {'request was' if left == 1 else 'requests were'} not finished and ended.")
    await server.stop(grace_s=0)
    signals.release()


def _tell(console: Any, line: str) -> None:
    """Print a line where somebody may read it: the terminal may have been closed."""
    with contextlib.suppress(OSError):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _sizes(config: ServiceConfig) -> str:
    """How many workers there are to begin with."""
    return ", ".join(f"{group.settings.replicas} {group.key}" for group in groups_of(config))


def _welcome(config: ServiceConfig, address: str, model: Any) -> str:
    from cluster.recall import EXAMPLE, is_shipped

    tls, token = config.server.tls_cert is not None, config.server.auth_token is not None
    client = "" if address == "127.0.0.1:50051" else f" --server {address}"
    client += " --tls-ca CA.pem" if tls else ""
    curl = "" if tls else "-plaintext "
    curl += '-H "authorization: Bearer $BATON_TOKEN" ' if token else ""
    prompt = EXAMPLE if is_shipped(config.model.path) else "Hello"
    lines = [
        f"Baton serves {model.name} on {address} ({_sizes(config)}, context {model.max_model_len} tokens).",
        "Try it:",
        f'  baton generate "{prompt}"{client}',
        f"  baton status{client}",
    ]
    if config.server.reflection:
        lines.append(f'  grpcurl {curl}-d \'{{"text": "{prompt}"}}\' {address} baton.v1.Baton/Generate')
    if token:
        lines.insert(2, "  export BATON_TOKEN=…   the server asks for its token")
    return "\n".join([*lines, "Ctrl-C stops it."])

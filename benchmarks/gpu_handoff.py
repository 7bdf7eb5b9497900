"""The handoff as clients see it: a service on one GPU and on two, through its front door.

    python -m benchmarks.gpu_handoff --devices 0      one GPU, which prefill and decode share
    python -m benchmarks.gpu_handoff --devices 0,1    a GPU each

Starts `baton up` with the shape of Llama-3.1-8B and random weights in bfloat16, times it from the start of the process
to the first token served, then sends prompts one at a time, a Poisson load, and short requests.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, Environment, gpu_names
from benchmarks.model_shapes import MODEL_HELP, model_folder
from benchmarks.report import to_json, write_json
from benchmarks.running_service import RunningService, stop_all
from benchmarks.server_process import server_process
from benchmarks.service_points import add_service_arguments, first_requests, measure_service
from cluster.client.client import AsyncBatonClient, Connection
from workers.errors import BatonError

_READY = re.compile(r"^Baton serves \S+ on (\S+) \(", re.MULTILINE)
_INFO_TIMEOUT_S = 10.0
_CACHES = ("TRITON_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE")


@asynccontextmanager
async def running_service(
    args: argparse.Namespace, folder: Path, environ: Mapping[str, str], log: Path, found: dict[str, Any]
) -> AsyncIterator[RunningService]:
    """Start `baton up` and wait until it serves; `found` gets its workers. Stopped when the block ends.

    Raises:
        ConfigError: it did not start.
    """
    environ = {"CUDA_VISIBLE_DEVICES": args.devices, **environ}
    with server_process(command(args, folder), environ, log) as server:

        def address() -> str | None:
            match = _READY.search(server.text())
            return match[1] if match else None

        try:
            where = await server.wait_for(address, args.start_timeout)
            found["ready_s"] = time.perf_counter() - server.started
            async with AsyncBatonClient(Connection(where)) as client:
                model, workers = await client.model_info(_INFO_TIMEOUT_S), await client.workers(_INFO_TIMEOUT_S)
                found["workers"] = [
                    {
                        "role": w.role,
                        "device": w.device,
                        "attention_backend": w.attention_backend,
                        "blocks": w.load.total_blocks,
                    }
                    for w in workers
                ]
                yield RunningService(client, where, [server], model.vocab_size, model.max_model_len)
        finally:
            await stop_all([server])


async def measure(
    service: RunningService, args: argparse.Namespace, found: dict[str, Any], save: Callable[[], None]
) -> None:
    """Ask everything of a service; what is there so far is saved after each part."""

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)
        save()

    await first_requests(service.client, args, service.vocab_size, service.started, found)
    report(f"first token after {found['first_token_s']:.1f} s; {found.get('workers', '')}")
    await measure_service(service.client, args, service.vocab_size, service.max_model_len, report, found)
    found["log"] = service.log_tails()
    save()


def command(args: argparse.Namespace, folder: Path) -> list[str]:
    """`baton up` for this benchmark."""
    settings = {
        "model.dtype": args.dtype,
        "model.max_model_len": args.max_model_len,
        "server.port": 0,
        "prefill.max_num_batched_tokens": args.max_num_batched_tokens,
        "prefill.enable_prefix_caching": False,  # a prompt that is measured again is computed again
        "decode.enable_prefix_caching": False,  # and handed over again
        "decode.max_num_seqs": args.max_num_seqs,
    }
    flags = [f"--set={key}={value}" for key, value in settings.items()] + [f"--set={text}" for text in args.set]
    return [sys.executable, "-m", "cluster.cli.main", "up", "--model", str(folder), "--load-format", "dummy", *flags]


def kernel_caches(folder: Path | None) -> tuple[dict[str, str], bool | None]:
    """The environment that puts compiled kernels under `folder`, and whether there are none yet; None: as ever."""
    if folder is None:
        return {}, None
    places = {variable: str(folder.resolve() / variable.lower()) for variable in _CACHES}
    empty = not any(Path(place).is_dir() and any(Path(place).iterdir()) for place in places.values())
    for place in places.values():
        Path(place).mkdir(parents=True, exist_ok=True)
    return places, empty


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that both this benchmark and its peer's have."""
    parser.add_argument("--devices", default="0", metavar="N[,N]", help="GPUs: one, or two (default: 0)")
    parser.add_argument("--dtype", default="bfloat16", help="default: bfloat16")
    parser.add_argument("--model", type=Path, metavar="DIR", help=MODEL_HELP)
    parser.add_argument("--max-model-len", type=int, default=16384, metavar="N", help="default: 16384")
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192, metavar="N", help="default: 8192")
    parser.add_argument("--max-num-seqs", type=int, default=256, metavar="N", help="of decode (default: 256)")
    parser.add_argument("--start-timeout", type=float, default=240.0, metavar="S", help="default: 240")
    parser.add_argument("--kernel-cache", type=Path, metavar="DIR", help="where compiled kernels are kept")
    parser.add_argument("--run", default="", metavar="NAME", help="of the run that results belong to")
    parser.add_argument("--note", default="", help="what else is to be known of the run")
    add_service_arguments(parser)


def config_of(args: argparse.Namespace, engine: str, cold: bool | None) -> dict[str, Any]:
    """The flags as they are kept with the result."""
    left_out = {"output", "model", "kernel_cache", "load", "short", "long", "log", "vllm_path"}
    flags = {name: value for name, value in vars(args).items() if name not in left_out}
    loads = {
        "load": list(map(str, args.load)),
        "short": None if args.short is None else str(args.short),
        "long": asdict(args.long),
    }
    about = {"engine": engine, "gpus": len(set(args.devices.split(","))), "gpu_names": gpu_names(), "cold_caches": cold}
    return {**flags, **loads, **about}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser("gpu_handoff", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting of `baton up`")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: benchmarks/results/gpu_service_baton_…")
    parser.add_argument("--log", type=Path, metavar="FILE", help="of the server; default: not kept")
    add_arguments(parser)
    args = parser.parse_args(argv)
    environment = Environment.capture(threads=None)
    environ, cold = kernel_caches(args.kernel_cache)
    config = config_of(args, "baton", cold)
    output = args.output or RESULTS / f"gpu_service_baton_{config['gpus']}gpu.json"
    found: dict[str, Any] = {}

    def save() -> None:
        write_json(output, to_json("gpu_service", environment, config, found))

    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(args.model, Path(scratch))
        log = args.log or Path(scratch) / "server.log"

        async def run() -> None:
            async with running_service(args, folder, environ, log, found) as service:
                await measure(service, args, found, save)

        try:
            asyncio.run(run())
        except BatonError as error:
            print(f"gpu_handoff: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

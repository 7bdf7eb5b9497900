"""The handoff of vLLM as clients see it: what `benchmarks.gpu_handoff` asks of Baton, asked of vLLM's OpenAI server.

    python -m benchmarks.peers.vllm_handoff --vllm-path DIR --devices 0      one server
    python -m benchmarks.peers.vllm_handoff --vllm-path DIR --devices 0,1    prefill and decode with NixlConnector

The client runs in Baton's environment, with Baton's load generator; the servers run in vLLM's, as processes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, Environment
from benchmarks.free_port import free_port
from benchmarks.gpu_handoff import add_arguments, config_of, measure
from benchmarks.model_shapes import model_folder
from benchmarks.peers.openai_client import DisaggregatedClient, Endpoint, OpenAIClient
from benchmarks.report import to_json, write_json
from benchmarks.running_service import RunningService, stop_all
from benchmarks.server_process import server_process
from workers.errors import BatonError

_HOST = "127.0.0.1"
_HTTP_TIMEOUT_S = 2.0
_CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "VLLM_CACHE_ROOT": "vllm",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
}
_SHARED_CACHE = "FLASHINFER_WORKSPACE_BASE"
"""FlashInfer locks what it builds."""


def command(args: argparse.Namespace, folder: Path, port: int, role: str | None) -> list[str]:
    """vLLM's OpenAI server: one for all, or the `kv_producer` or `kv_consumer` of a pair."""
    flags = {
        "--model": str(folder.resolve()),
        "--served-model-name": "model",
        "--load-format": "dummy",
        "--dtype": args.dtype,
        "--host": _HOST,
        "--port": port,
        "--max-model-len": args.max_model_len,
        "--max-num-seqs": args.max_num_seqs,
        "--max-num-batched-tokens": args.max_num_batched_tokens,
        "--block-size": args.block_size,
        "--gpu-memory-utilization": args.gpu_memory_utilization,
    }
    words = [str(word) for pair in flags.items() for word in pair]
    words += ["--no-enable-prefix-caching", "--disable-uvicorn-access-log"]
    if args.kv_cache_gb is not None:
        words += ["--kv-cache-memory-bytes", str(round(args.kv_cache_gb * 1e9))]
    if role is not None:
        words += ["--kv-transfer-config", json.dumps({"kv_connector": args.connector, "kv_role": role})]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words]


def environ_of(args: argparse.Namespace, device: str, number: int) -> dict[str, str]:
    """What the environment of a service's server of that number has beside this process's."""
    environ = {
        "CUDA_VISIBLE_DEVICES": device,
        "PYTHONPATH": str(args.vllm_path.resolve()),
        "VLLM_NIXL_SIDE_CHANNEL_HOST": _HOST,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if args.kernel_cache is not None:
        environ[_SHARED_CACHE] = str(args.kernel_cache.resolve() / "flashinfer")
        own = args.kernel_cache.resolve() / str(number)  # two that compile the same at once do not meet in one folder
        environ |= {variable: str(own / name) for variable, name in _CACHES.items()}
    return environ


def healthy(endpoint: Endpoint) -> str | None:
    """The server's version, or "unknown", once it can serve; None before."""
    base = f"http://{endpoint.host}:{endpoint.port}"
    try:
        with urllib.request.urlopen(f"{base}/health", timeout=_HTTP_TIMEOUT_S):
            pass
    except OSError:  # refused, reset, or answered with an error
        return None
    try:
        with urllib.request.urlopen(f"{base}/version", timeout=_HTTP_TIMEOUT_S) as answer:
            return str(json.loads(answer.read())["version"])
    except (OSError, ValueError, KeyError):
        return "unknown"


@contextlib.asynccontextmanager
async def running_service(
    args: argparse.Namespace, folder: Path, log: Path, found: dict[str, Any]
) -> AsyncIterator[RunningService]:
    """Start a server, or a pair, and wait until it serves; `found` gets the version. Stopped when the block ends.

    Raises:
        ConfigError: one did not start.
    """
    devices = args.devices.split(",")
    roles = (None,) if len(devices) == 1 else ("kv_producer", "kv_consumer")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    endpoints, servers = [], []
    with contextlib.ExitStack() as stack:
        try:
            for number, (device, role) in enumerate(zip(devices, roles, strict=True)):
                endpoints.append(Endpoint(_HOST, free_port(), "model"))
                words = command(args, folder, endpoints[-1].port, role)
                around = environ_of(args, device, number)
                own_log = log.with_suffix(f".{number}.log")
                servers.append(stack.enter_context(server_process(words, around, own_log, log.parent)))
            for server, endpoint in zip(servers, endpoints, strict=True):
                found["version"] = await server.wait_for(partial(healthy, endpoint), args.start_timeout)
                found.setdefault("ready_s", []).append(time.perf_counter() - server.started)
            client = OpenAIClient(endpoints[0]) if len(endpoints) == 1 else DisaggregatedClient(*endpoints)
            yield RunningService(client, "", servers, int(config["vocab_size"]), args.max_model_len)
        finally:
            await stop_all(servers)


def add_vllm_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that only vLLM's servers have."""
    parser.add_argument("--block-size", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9, metavar="SHARE", help="default: 0.9")
    parser.add_argument(
        "--kv-cache-gb", type=float, metavar="GB", help="of each server (10^9 bytes); default: what its share leaves"
    )
    parser.add_argument(
        "--connector", default="NixlConnector", metavar="NAME",
        help="of a pair: NixlConnector, whose decode server reads, or NixlPushConnector (default: %(default)s)",
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser("vllm_handoff", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--vllm-path", type=Path, required=True, metavar="DIR", help="where vLLM is installed")
    add_vllm_arguments(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: benchmarks/results/gpu_service_vllm_…")
    parser.add_argument("--log", type=Path, metavar="FILE", help="of the servers, with a number; default: not kept")
    add_arguments(parser)
    args = parser.parse_args(argv)
    environment = Environment.capture(threads=None)
    cold = None if args.kernel_cache is None else not (args.kernel_cache.is_dir() and any(args.kernel_cache.iterdir()))
    config = config_of(args, "vllm", cold)
    output = args.output or RESULTS / f"gpu_service_vllm_{config['gpus']}gpu.json"
    found: dict[str, Any] = {}

    def save() -> None:
        write_json(output, to_json("gpu_service", environment, config, found))

    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(args.model, Path(scratch))
        log = args.log or Path(scratch) / "server.log"

        async def run() -> None:
            async with running_service(args, folder, log, found) as service:
                await measure(service, args, found, save)

        try:
            asyncio.run(run())
        except BatonError as error:
            print(f"vllm_handoff: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

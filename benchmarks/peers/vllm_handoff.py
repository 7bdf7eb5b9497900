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
import socket
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, Environment
from benchmarks.gpu_handoff import add_arguments, config_of
from benchmarks.model_shapes import model_folder
from benchmarks.peers.openai_client import DisaggregatedClient, Endpoint, OpenAIClient
from benchmarks.report import to_json, write_json
from benchmarks.server_process import ServerProcess, server_process
from benchmarks.service_points import measure_service, time_first_token
from workers.errors import BatonError

_HOST = "127.0.0.1"
_HTTP_TIMEOUT_S = 2.0
_CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "VLLM_CACHE_ROOT": "vllm",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
}


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
    if role is not None:
        words += ["--kv-transfer-config", json.dumps({"kv_connector": "NixlConnector", "kv_role": role})]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words]


def environ_of(args: argparse.Namespace, device: str, cache: Path | None) -> dict[str, str]:
    """What a server's environment has beside this process's."""
    environ = {
        "CUDA_VISIBLE_DEVICES": device,
        "PYTHONPATH": str(args.vllm_path.resolve()),
        "VLLM_NIXL_SIDE_CHANNEL_HOST": _HOST,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if cache is not None:
        environ |= {variable: str(cache.resolve() / name) for variable, name in _CACHES.items()}
    return environ


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port


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


async def measure(
    servers: Sequence[tuple[ServerProcess, Endpoint]],
    args: argparse.Namespace,
    found: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """Wait for the servers, then ask everything of them; what is there so far is saved after each part."""

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)
        save()

    for server, endpoint in servers:

        def version(endpoint: Endpoint = endpoint) -> str | None:
            return healthy(endpoint)

        found["version"] = await server.wait_for(version, args.start_timeout)
        found.setdefault("ready_s", []).append(time.perf_counter() - server.started)
    endpoints = [endpoint for _, endpoint in servers]
    client = OpenAIClient(endpoints[0]) if len(endpoints) == 1 else DisaggregatedClient(endpoints[0], endpoints[1])
    vocab_size = int(found["vocab_size"])
    found["first_token_s"] = await time_first_token(client, vocab_size, servers[0][0].started)
    report(f"first token after {found['first_token_s']:.1f} s")
    await measure_service(client, args, vocab_size, args.max_model_len, report, found)
    found["log"] = [server.text().splitlines()[-40:] for server, _ in servers]
    save()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser("vllm_handoff", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--vllm-path", type=Path, required=True, metavar="DIR", help="where vLLM is installed")
    parser.add_argument("--block-size", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9, metavar="SHARE", help="default: 0.9")
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

    devices = args.devices.split(",")
    roles = (None,) if len(devices) == 1 else ("kv_producer", "kv_consumer")
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder = model_folder(args.model, Path(scratch))
        found["vocab_size"] = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        servers = []
        try:
            for number, (device, role) in enumerate(zip(devices, roles, strict=True)):
                endpoint = Endpoint(_HOST, free_port(), "model")
                log = (args.log or Path(scratch) / "server.log").with_suffix(f".{number}.log")
                environ = environ_of(args, device, args.kernel_cache)
                words = command(args, folder, endpoint.port, role)
                server = stack.enter_context(server_process(words, environ, log, Path(scratch)))
                servers.append((server, endpoint))
            asyncio.run(measure(servers, args, found, save))
        except BatonError as error:
            print(f"vllm_handoff: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What disaggregation adds: time to first token through the whole service, less prefill alone, and where it goes.

    python -m benchmarks.disaggregation_cost

One request at a time goes through gRPC, router, prefill actor and decode actor; in turns with it, the same prompt is
computed by a prefill worker in this process with nothing around it, with the same number of threads.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.engine_alone import EngineAlone
from benchmarks.environment import RESULTS, ROOT, Environment
from benchmarks.measure import Client, Row, WallClock, measure_request
from benchmarks.report import to_json, write_json
from benchmarks.synthetic_model import SHAPE, save_checkpoint
from benchmarks.workload import RequestSpec
from cluster.client.client import AsyncBatonClient, Connection
from cluster.config.load import load_config
from cluster.config.schema import ServiceConfig
from workers.errors import BatonError
from workers.sampling_params import SamplingParams

RECALL = ROOT / "deploy" / "models" / "recall"
LABELS = {
    "prefill_alone": "prefill alone",
    "ttft": "TTFT through the service",
    "added_ttft": "added to TTFT",
    "front": "– gRPC, checks, text",
    "worker_calls": "– Ray call there, token stream back",
    "queues": "– queues",
    "added_by_actor": "– prefill slower on the actor",
    "added_by_push": "– prefill slower while pushing KV",
    "transfer": "transfer",
    "exposed_transfer": "exposed transfer",
    "first_decode": "first decode",
    "first_itl": "first ITL",
    "itl": "later ITL",
    "added_first_itl": "added to the first ITL",
}
"""What the tables call the medians, in order."""

_MAX_MODEL_LEN = 1024
_TIMEOUT_S = 60.0
_WARMUP = 3


@dataclass(frozen=True)
class Cost:
    """Where the time of one request went, seconds.

    `front + worker_calls + queues + prefill` is `ttft`. `prefill - actor_prefill` is what pushing the cache costs while
    the prompt is computed, and `actor_prefill - prefill_alone` what being an actor costs.

    Attributes:
        prefill_alone: from handing the prompt to a prefill worker in this process to its first token.
        actor_prefill: the same on the prefill actor, for a request of a single token: it has no handoff.
        ttft: from the client's call to the first token at the client.
        front: gRPC both ways, validation, detokenisation: the client's time to first token less the gateway's.
        worker_calls: the Ray call to the prefill actor and the first token's way back through its stream.
        queues: waiting at the gateway and on the prefill worker.
        prefill: computing the prompt and sampling, on the actor, with the cache being pushed meanwhile.
        transfer: while KV cache was in flight.
        exposed_transfer: the part of it after prefill.
        first_decode: from the complete cache on the decode worker to its first token.
        first_itl: from the first to the second token at the client: all that the handoff adds shows here.
        itl: a later interval, the median of this request's.
        kv_bytes: of KV cache moved.
    """

    prefill_alone: float
    actor_prefill: float
    ttft: float
    front: float
    worker_calls: float
    queues: float
    prefill: float
    transfer: float
    exposed_transfer: float
    first_decode: float
    first_itl: float
    itl: float
    kv_bytes: int

    @classmethod
    def of(cls, row: Row, single: Row, prefill_alone: float) -> Cost:
        """From a request as its client saw it and the server explained it, and one for a single token.

        Raises:
            ValueError: a request failed or has no report, or `row` has fewer than three tokens.
        """
        if single.report is None:
            raise ValueError(f"request {single.index} cannot be accounted for: {single.status} {single.error}")
        report, ttft = row.report, row.ttft_s
        if not row.ok or report is None or ttft is None or len(row.itl_s) < 2:
            raise ValueError(f"request {row.index} cannot be accounted for: {row.status} {row.error}")
        return cls(
            prefill_alone=prefill_alone,
            actor_prefill=single.report.prefill_s,
            ttft=ttft,
            front=ttft - report.ttft_s,
            worker_calls=report.ttft_s - report.queue_s - report.prefill_s,
            queues=report.queue_s,
            prefill=report.prefill_s,
            transfer=report.transfer_s,
            exposed_transfer=report.exposed_transfer_s,
            first_decode=report.first_decode_s,
            first_itl=row.itl_s[0],
            itl=statistics.median(row.itl_s[1:]),
            kv_bytes=report.kv_bytes,
        )


@dataclass(frozen=True)
class Case:
    """One model at one prompt length, request by request."""

    model: str
    prompt_tokens: int
    costs: tuple[Cost, ...]

    @property
    def medians(self) -> dict[str, float]:
        """Of every field of `Cost`, and of what is added to the time to first token and to the second token."""
        rows = [
            {
                **asdict(c),
                "added_ttft": c.ttft - c.prefill_alone,
                "added_by_actor": c.actor_prefill - c.prefill_alone,
                "added_by_push": c.prefill - c.actor_prefill,
                "added_first_itl": c.first_itl - c.itl,
            }
            for c in self.costs
        ]
        return {name: statistics.median(row[name] for row in rows) for name in rows[0]}

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "model": self.model,
            "prompt_tokens": self.prompt_tokens,
            "medians": self.medians,
            "requests": [asdict(cost) for cost in self.costs],
        }


async def measure_service(
    name: str, checkpoint: Path, lengths: Sequence[int], args: argparse.Namespace, report: Callable[[str], None]
) -> list[Case]:
    """Start a service for a checkpoint, measure every length, stop it."""
    from cluster.launch import launch
    from cluster.server.grpc.serve import start_server

    alone = EngineAlone(checkpoint, max_num_seqs=1, max_model_len=_MAX_MODEL_LEN)
    config = _service_config(checkpoint, args.threads)
    async with launch(config, report) as service:
        server = await start_server(config.server, service.generation, service.engine, service.model_info)
        try:
            async with AsyncBatonClient(Connection(server.address)) as client:
                cases = []
                for length in lengths:
                    report(f"{name}, {length} prompt tokens: {args.requests} requests")
                    cases.append(await measure_case(name, length, client, alone, args))
                return cases
        finally:
            await server.stop()


async def measure_case(
    name: str, prompt_tokens: int, client: Client, alone: EngineAlone, args: argparse.Namespace
) -> Case:
    """One prompt after another: alone, then for one token and for several from the service. The first do not count."""
    rng = random.Random(f"{args.seed}/{name}/{prompt_tokens}")
    sampling = SamplingParams(temperature=0.0, max_tokens=args.output_tokens, ignore_eos=True)
    clock = WallClock()
    costs = []
    for index in range(args.requests + _WARMUP):
        prompt = tuple(rng.randrange(alone.vocab_size) for _ in range(prompt_tokens))
        prefill_alone = alone.prefill_alone(prompt)
        spec = RequestSpec(index, prompt, None, None, sampling)
        single = RequestSpec(index, prompt, None, None, replace(sampling, max_tokens=1))
        rows = [await measure_request(client, spec, clock, clock.now(), 0.0, _TIMEOUT_S) for spec in (single, spec)]
        if index >= _WARMUP:
            costs.append(Cost.of(rows[1], rows[0], prefill_alone))
    return Case(name, prompt_tokens, tuple(costs))


def _service_config(checkpoint: Path, threads: int) -> ServiceConfig:
    overrides: dict[str, Any] = {
        "model.path": str(checkpoint),
        "model.dtype": "float32",
        "model.max_model_len": _MAX_MODEL_LEN,
        "server.port": 0,
        "prefill.threads": threads,
        "decode.threads": threads,
        "prefill.max_num_seqs": 4,
        "prefill.enable_prefix_caching": False,
        "decode.enable_prefix_caching": False,
        "decode.max_num_seqs": 4,
    }
    return load_config(environ={}, overrides=overrides)


def _print(cases: Sequence[Case]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("milliseconds", title="Medians, one request at a time", title_justify="left")
    for case in cases:
        table.add_column(f"{case.model}\n{case.prompt_tokens} tokens", justify="right")
    medians = [case.medians for case in cases]
    for name, label in LABELS.items():
        table.add_row(label, *(f"{median[name] * 1e3:.2f}" for median in medians))
    table.add_row("KV cache moved, KiB", *(f"{median['kv_bytes'] / 1024:.0f}" for median in medians))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser("disaggregation_cost", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[64, 256, 512], metavar="N")
    parser.add_argument("--output-tokens", type=int, default=12, metavar="N", help="at least 3 (default: 12)")
    parser.add_argument("--requests", type=int, default=20, metavar="N", help="of each length (default: 20)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads of a worker (default: 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and prompts")
    parser.add_argument("--output", type=Path, default=RESULTS / "disaggregation_cost.json", metavar="FILE")
    args = parser.parse_args(argv)
    import torch

    torch.set_num_threads(args.threads)
    environment = Environment.capture(args.threads)

    def report(line: str) -> None:
        print(line, file=sys.stderr)

    try:
        with tempfile.TemporaryDirectory() as folder:
            parameters = save_checkpoint(Path(folder), args.seed)
            models = (("100M", Path(folder)), ("recall", RECALL))
            cases = [
                case
                for name, checkpoint in models
                for case in asyncio.run(measure_service(name, checkpoint, args.prompt_tokens, args, report))
            ]
    except (BatonError, ValueError) as error:
        print(f"disaggregation_cost: {error}", file=sys.stderr)
        return 1
    _print(cases)
    config = {
        "model": {**SHAPE, "parameters": parameters},
        "prompt_tokens": args.prompt_tokens,
        "output_tokens": args.output_tokens,
        "requests": args.requests,
        "seed": args.seed,
        "connector": "nixl",
    }
    results = {"cases": [case.to_json() for case in cases]}
    write_json(args.output, to_json("disaggregation_cost", environment, config, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`baton demo`: a small service on this machine, a handful of prompts, and where their time went."""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cluster.api import RequestReport
from cluster.client.client import AsyncBatonClient, Connection
from cluster.config.load import load_config
from cluster.config.schema import ServiceConfig
from cluster.recall import recall_prompt
from workers.sampling_params import SamplingParams

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_LIST_LENGTHS = (3, 8, 16, 32, 48, 64)
_SHOWN = 56
_COLUMNS = (
    ("prompt", "tokens"),
    ("output", "tokens"),
    ("TTFT", "ms"),
    ("ITL", "ms"),
    ("handoff", "ms"),
    ("KV moved", "KiB"),
    ("hidden", "%"),
)
_TIMEOUT_S = 60.0


@dataclass
class _Answer:
    """One request: what was asked, what is expected, what came."""

    prompt: str
    expected: str | None
    text: str = ""
    started: float = 0.0
    token_times: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    report: RequestReport | None = None

    @property
    def right(self) -> bool:
        return self.expected is None or self.text.strip() == self.expected

    @property
    def itl_s(self) -> float:
        """Mean time between tokens, as the client saw it."""
        gaps = len(self.token_times) - 1
        return (self.token_times[-1] - self.token_times[0]) / gaps if gaps > 0 else 0.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.description = (
        "Start Ray on this machine with prefill and decode workers, send prompts through the gRPC client, stream the "
        "answers, show one row per request, stop everything."
    )
    parser.add_argument("--model", metavar="DIR|HUB_ID", help="checkpoint, or recall-mla; default: recall")
    parser.add_argument("--prefill", metavar="N", default="1", help="prefill workers (default %(default)s)")
    parser.add_argument("--decode", metavar="N", default="1", help="decode workers (default %(default)s)")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt of your own; may be repeated")
    parser.add_argument("--max-tokens", type=int, default=16, metavar="N", help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the lists (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run the command; fails if an answer whose right one is known is wrong."""
    overrides = {"prefill.replicas": args.prefill, "decode.replicas": args.decode, "server.port": 0}
    config = load_config(overrides=overrides)
    config = replace(config, model=replace(config.model, path=args.model or config.model.path))
    answers = _questions(args.prompt, args.seed)
    asyncio.run(_demo(config, answers, args.max_tokens))
    return 0 if all(answer.right for answer in answers) else 1


def _questions(prompts: list[str] | None, seed: int) -> list[_Answer]:
    if prompts:
        return [_Answer(prompt, None) for prompt in prompts]
    rng = random.Random(seed)
    made = [recall_prompt(rng, entries) for entries in _LIST_LENGTHS]
    return [_Answer(prompt.text, prompt.answer) for prompt in made]


async def _demo(config: ServiceConfig, answers: list[_Answer], max_tokens: int) -> None:
    from rich.console import Console

    from cluster.launch import launch
    from cluster.server.grpc.serve import start_server

    console = Console()
    began = time.monotonic()

    def report(step: str) -> None:
        console.print(f"{time.monotonic() - began:6.1f} s  {step}", markup=False, highlight=False, soft_wrap=True)

    async with launch(config, report) as service:
        server = await start_server(config.server, service.generation, service.engine, service.model_info)
        report(f"{service.model_info.name} is served on {server.address}")
        console.print()
        try:
            async with AsyncBatonClient(Connection(server.address)) as client:
                for answer in answers:
                    await _ask(client, answer, max_tokens, console)
        finally:
            await server.stop()
        console.print()
        console.print(_table(answers))
        right = sum(answer.right for answer in answers if answer.expected is not None)
        known = sum(answer.expected is not None for answer in answers)
        if known:
            console.print(f"{right} of {known} answers are right.")
        report("stopping")
    report("stopped")


async def _ask(client: AsyncBatonClient, answer: _Answer, max_tokens: int, console: Console) -> None:
    """Send one prompt and show its answer as it comes."""
    shown = answer.prompt if len(answer.prompt) <= _SHOWN else "… " + answer.prompt[-_SHOWN:]
    console.print(f"  {shown}", end=" ", markup=False, highlight=False, style="dim")
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    answer.started = time.monotonic()
    async for chunk in client.generate(answer.prompt, sampling=sampling, timeout_s=_TIMEOUT_S):
        answer.text += chunk.text
        answer.token_times += [time.monotonic()] * len(chunk.token_ids)
        console.print(chunk.text.strip("\n"), end="", markup=False, highlight=False, style="bold")
        if chunk.usage is not None:
            answer.prompt_tokens, answer.output_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
            answer.report = chunk.report
    if answer.expected is None:
        console.print()
    else:
        console.print("  [green]right[/]" if answer.right else f"  [red]wrong, it is {answer.expected}[/]")


def _table(answers: list[_Answer]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("workers", no_wrap=True)
    for quantity, unit in _COLUMNS:
        table.add_column(f"{quantity}\n{unit}", justify="right", no_wrap=True)
    for answer in answers:
        report = answer.report
        if report is None:
            continue
        table.add_row(
            f"{_short(report.prefill_worker)} → {_short(report.decode_worker)}",
            str(answer.prompt_tokens),
            str(answer.output_tokens),
            f"{(answer.token_times[0] - answer.started) * 1e3:.1f}",
            f"{answer.itl_s * 1e3:.1f}",
            f"{report.transfer_s * 1e3:.2f}",
            f"{report.kv_bytes / 1024:.0f}",
            f"{report.hidden_fraction * 100:.0f}",
        )
    table.caption = (
        "TTFT and ITL as the client saw them. handoff: time during which KV cache was in flight; "
        "hidden: the share of it that passed while prefill was still computing."
    )
    return table


def _short(engine_id: str) -> str:
    return engine_id.partition(".")[0] or "-"

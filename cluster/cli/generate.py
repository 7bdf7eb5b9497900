"""`baton generate`: send a prompt, stream the answer."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from cluster.api import RequestReport, Usage
from cluster.cli.connection import add_connection_arguments, connection_of
from cluster.client.client import BatonClient
from cluster.client.messages import GenerateChunk, TokenLogprob
from workers.errors import InvalidRequestError
from workers.messages import FinishReason
from workers.sampling_params import SamplingParams

_EPILOG = """\
examples:
  baton generate "The capital of France is" --max-tokens 16 --temperature 0
  baton generate --chat "Who wrote Faust?" --stats
  cat prompt.txt | baton generate - --json

What is not given has the server's default: temperature 1, up to the end of the context window.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.description = "Send a prompt to a Baton server and print the answer as it comes."
    parser.epilog = _EPILOG
    parser.add_argument(
        "prompt", metavar="PROMPT", help="the prompt; - reads it from standard input, less a last newline"
    )
    parser.add_argument("--chat", action="store_true", help="send the prompt as a user's chat message")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="deadline, seconds (default: 600)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of the text")
    parser.add_argument("--stats", action="store_true", help="print token counts and timings to standard error")
    parser.add_argument("--priority", type=int, default=0, metavar="N", help="lower ones go first (default: 0)")
    parser.add_argument("--user", default="", metavar="NAME", help="whose request it is; users take turns")
    add_connection_arguments(parser)
    add_sampling_arguments(parser)
    parser.add_argument("--logprobs", type=int, metavar="N", help="with --json: log-probabilities, and of the N best")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how tokens are chosen."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, metavar="N", help="tokens to generate at most")
    group.add_argument("--min-tokens", type=int, metavar="N", help="tokens before the text may end")
    group.add_argument("--temperature", type=float, metavar="T", help="0 always takes the most likely token")
    group.add_argument("--top-p", type=float, metavar="P", help="keep the most likely tokens that make up this share")
    group.add_argument("--top-k", type=int, metavar="K", help="keep this many most likely tokens; 0 keeps all")
    group.add_argument("--min-p", type=float, metavar="P", help="drop tokens less likely than this share of the best")
    group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same tokens")
    group.add_argument("--presence-penalty", type=float, metavar="X", help="against tokens used before, -2 to 2")
    group.add_argument("--frequency-penalty", type=float, metavar="X", help="the same, for each use, -2 to 2")
    group.add_argument(
        "--repetition-penalty", type=float, metavar="X", help="against tokens of prompt and text; 1 is none"
    )
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    group.add_argument("--ignore-eos", action="store_true", default=None, help="go on past the end-of-sequence token")


_SAMPLING_FLAGS = (
    "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "ignore_eos", "logprobs",
)  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    sampling = sampling_of(args)
    prompt = _read_standard_input() if args.prompt == "-" else args.prompt
    if args.timeout <= 0:
        raise InvalidRequestError(f"--timeout is {args.timeout:g}, it must be more than 0")
    with BatonClient(connection_of(args)) as client:
        chunks = client.generate(
            None if args.chat else prompt,
            chat=[("user", prompt)] if args.chat else None,
            sampling=sampling,
            priority=args.priority,
            user=args.user,
            timeout_s=args.timeout,
        )
        last = _print_json(list(chunks)) if args.json else _print_text(chunks)
    if args.stats and last.usage is not None:
        print(stats(last.usage, last.finish_reason, last.report), file=sys.stderr)
    return 0


def sampling_of(args: argparse.Namespace) -> SamplingParams:
    """What the flags say."""
    values: dict[str, Any] = {
        name: getattr(args, name) for name in _SAMPLING_FLAGS if getattr(args, name, None) is not None
    }
    return SamplingParams(stop=tuple(args.stop or ()), **values)


def _read_standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"standard input is not UTF-8: byte {error.start} is wrong") from error


def _print_text(chunks: Iterator[GenerateChunk]) -> GenerateChunk:
    chunk: GenerateChunk | None = None
    try:
        for chunk in chunks:
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
    finally:
        if chunk is not None:
            print(flush=True)
    return _last(chunk)


def _print_json(chunks: list[GenerateChunk]) -> GenerateChunk:
    last = _last(chunks[-1] if chunks else None)
    answer: dict[str, Any] = {
        "request_id": last.request_id,
        "text": "".join(chunk.text for chunk in chunks),
        "token_ids": [token_id for chunk in chunks for token_id in chunk.token_ids],
        "finish_reason": last.finish_reason and last.finish_reason.value,
        "usage": last.usage and asdict(last.usage),
        "timings": last.report and {**asdict(last.report), "hidden_fraction": last.report.hidden_fraction},
    }
    logprobs = [entry for chunk in chunks for entry in chunk.logprobs]
    if logprobs:
        answer["logprobs"] = [{**_logprob(p.chosen), "top": [_logprob(entry) for entry in p.top]} for p in logprobs]
    print(json.dumps(answer, ensure_ascii=False))
    return last


def _last(chunk: GenerateChunk | None) -> GenerateChunk:
    if chunk is None:
        raise InvalidRequestError("the server ended the answer before it began")
    return chunk


def _logprob(entry: TokenLogprob) -> dict[str, Any]:
    return asdict(entry)


def stats(usage: Usage, finish_reason: FinishReason | None, report: RequestReport | None) -> str:
    """What a request took, for people."""
    reason = finish_reason.value if finish_reason else "unknown"
    lines = [f"{usage.prompt_tokens} prompt tokens, {usage.completion_tokens} generated, ended by {reason}"]
    if report is not None:
        lines.append(
            f"first token {_ms(report.ttft_s)}: queue {_ms(report.queue_s)}, prefill {_ms(report.prefill_s)}"
            + (f" ({report.cached_tokens} prompt tokens were cached)" if report.cached_tokens else "")
        )
        if report.prefill_worker:
            lines.append(
                f"handoff {report.kv_bytes / 2**20:.2f} MiB of KV cache in {_ms(report.transfer_s)}, "
                f"{report.hidden_fraction:.0%} of it hidden behind prefill, {_ms(report.exposed_transfer_s)} exposed"
                + (f" ({report.decode_cached_tokens} tokens were there)" if report.decode_cached_tokens else "")
            )
        lines += [
            f"first decode {_ms(report.first_decode_s)}",
            f"workers {_workers(report)}, attempts {report.attempts}",
        ]
    return "\n".join(lines)


def _workers(report: RequestReport) -> str:
    if not report.prefill_worker:
        return f"{report.decode_worker} alone"
    return f"{report.prefill_worker} → {report.decode_worker or 'none needed'}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"

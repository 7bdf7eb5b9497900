"""The command line."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from recall_training.architectures import ARCHITECTURES
from recall_training.checkpoint import load, save
from recall_training.damage import report_damage
from recall_training.evaluation import evaluate
from recall_training.tokenizer import build_tokenizer, check_tokenizer
from recall_training.training import train


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train or evaluate a recall model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="train, and write the checkpoint here")
    where.add_argument("--evaluate", type=Path, metavar="DIR", help="only evaluate a checkpoint")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eval-prompts", type=int, default=1000, help="prompts per list length")
    parser.add_argument("--require", type=float, default=0.99, help="accuracy below which to fail")
    parser.add_argument("--damage", action="store_true", help="also measure with a damaged cache")
    training = parser.add_argument_group("training")
    training.add_argument("--architecture", choices=sorted(ARCHITECTURES), default="llama")
    training.add_argument("--start", type=Path, metavar="DIR", help="begin with the weights of a checkpoint")
    training.add_argument(
        "--convert", type=Path, metavar="DIR", help="begin with what a llama checkpoint becomes as an mla one"
    )
    training.add_argument("--imitation-steps", type=int, default=600, help="after --convert")
    training.add_argument("--imitation-lr", type=float, default=2e-3)
    training.add_argument("--steps", type=int, default=16000, help="most steps")
    training.add_argument("--max-minutes", type=float, default=60.0, help="most minutes of training")
    training.add_argument("--good-enough", type=float, default=0.985, help="begins the cool-down")
    training.add_argument("--lr", type=float, default=2e-3)
    training.add_argument("--warmup", type=int, default=300, help="steps")
    training.add_argument("--cooldown", type=int, default=2000, help="steps")
    training.add_argument("--batch-tokens", type=int, default=65536)
    training.add_argument("--max-batch", type=int, default=512, help="most lists in a batch")
    training.add_argument("--queries", type=int, default=32, help="most queries per list")
    training.add_argument("--quick-prompts", type=int, default=512, help="prompts per report")
    training.add_argument("--dialogue-share", type=float, default=0.2, help="of the batches")
    training.add_argument("--balance-rate", type=float, default=1e-3, help="of the experts' biases, a step")
    training.add_argument("--report-every", type=int, default=250, help="steps")
    args = parser.parse_args(argv)
    if args.convert is not None and args.architecture != "mla":
        parser.error(f"--convert makes an mla model, not one of --architecture {args.architecture}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate and save, or only evaluate; return the exit status.

    A model that is trained and is not good enough is kept beside ``--out``, with ``-unfinished`` in
    its name; ``--start`` goes on from there.
    """
    args = parse(argv)
    device = torch.device(args.device)
    begin = time.monotonic()
    figures: dict[str, Any] = {}
    if args.evaluate:
        model, tokenizer = load(args.evaluate, device)
    else:
        tokenizer = build_tokenizer()
        check_tokenizer(tokenizer)
        model, figures = train(args, tokenizer, device)
    scores = evaluate(model, tokenizer, args.eval_prompts, args.seed)
    if args.damage:
        report_damage(model, tokenizer, args.seed)
    failed = [label for label, result in scores.items() if result.accuracy < args.require]
    if failed:
        print(f"below {100 * args.require:g} % on lists of {', '.join(failed)}", file=sys.stderr)
    if args.out:
        out = args.out.with_name(f"{args.out.name}-unfinished") if failed else args.out
        save(model, tokenizer, out)
        report = {
            "command": shlex.join(["python", sys.argv[0], *(argv or sys.argv[1:])]),
            "total_seconds": round(time.monotonic() - begin, 1),
            **figures,
            "accuracy": {label: asdict(result) for label, result in scores.items()},
        }
        text = json.dumps(report, indent=2) + "\n"
        (out / "training.json").write_text(text, encoding="utf-8")
        print(f"saved to {out}")
    return 1 if failed else 0

"""`baton backends`: which attention backends run a model, which would be chosen, and why not the others."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from attention.broken import broken_libraries
from attention.errors import AttentionBackendError
from attention.platform import SIMULATED, Platform
from attention.selection.by_kind import select_by_kind
from attention.selection.measure import BUDGET_S, measure
from attention.selection.measurements import FILE_NAME, load_ranking, save_record
from attention.selection.priority import candidates
from attention.selection.registry import BACKENDS, get_backend
from attention.selection.selector import unsupported_reasons
from attention.spec import FP8, AttentionNeeds, AttentionSpec, Feature, Phase
from cluster.cli.backends_report import Choice, Question, Report, Row, as_json, print_report
from cluster.config.load import cache_dir, load_config
from cluster.config.schema import ServiceConfig
from workers.errors import ConfigError
from workers.loading.checkpoint import resolve_checkpoint
from workers.models.causal_lm import attention_specs
from workers.models.config.model_config import DTYPES
from workers.models.loader import resolve_dtype
from workers.models.registry import read_model

_EPILOG = """\
A backend is taken from BATON_ATTENTION_BACKEND or {prefill,decode}.attention_backend; else it is the one that was
measured to be the fastest here (--measure); else the first that can run the model, in an order made for the device.

evidence: "ran" means that Baton's tests have run on this very architecture (SM 9.0, x86_64); what it does on others of
the family is taken from the kernels' own documentation, and it "never ran" there. (+2) means two more reasons, which
--explain shows.

examples:
  baton backends --model ~/models/llama --measure
  baton backends --simulate sm90 --kv-cache-dtype fp8 --explain
"""
_DEFAULT_NAME = "the shape of Llama 3.1 8B (--model takes another)"
_DEFAULT_LAYER = AttentionSpec(num_heads=32, num_kv_heads=8, head_size=128, scale=128**-0.5)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.description = "Show which attention backend would be chosen for prefill and decode, and why not the others."
    parser.epilog = _EPILOG
    parser.add_argument("--simulate", metavar="NAME", help=f"another platform than this one: {', '.join(SIMULATED)}")
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--model", metavar="DIR|HUB_ID", help="model to run; default: 32 query and 8 KV heads of 128")
    parser.add_argument(
        "--dtype",
        default="auto",
        metavar="NAME",
        help=f"{', '.join(DTYPES)} or auto: the model's own, else bfloat16, or float16 on a GPU without it",
    )
    parser.add_argument("--block-size", type=int, default=16, metavar="N", help="tokens per KV block (%(default)s)")
    parser.add_argument(
        "--kv-cache-dtype", default="auto", choices=("auto", "fp8"), help="auto stores what the model computes"
    )
    parser.add_argument("--explain", action="store_true", help="give every reason, not only the first")
    parser.add_argument("--measure", action="store_true", help="time the backends here, and keep the result")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    try:
        device = _device(args)
        platform = Platform.simulate(args.simulate) if device is None else Platform.of(device)
        question = _question(args, platform)
        path = cache_dir() / FILE_NAME
        if args.measure and device is not None:
            _measure(question, device, path)
        report = _answer(question, load_config(), path)
    except AttentionBackendError as error:
        raise ConfigError(str(error)) from error
    if args.json:
        print(json.dumps(as_json(report), indent=2))
    else:
        print_report(report, explain=args.explain)
    return 0 if all(choice.backends for choice in report.choices.values()) else 1


def _device(args: argparse.Namespace) -> torch.device | None:
    """The device to look at; None when it is simulated."""
    if args.simulate is not None:
        if args.measure or args.device is not None:
            flag = "--measure" if args.measure else "--device"
            raise ConfigError(f"{flag} is about a device of this machine, --simulate about one that is not here")
        return None
    available = torch.cuda.is_available()
    if args.device not in (None, "cpu", "cuda"):
        raise ConfigError(f"--device is {args.device!r}, it must be cpu or cuda")
    if args.device == "cuda" and not available:
        raise ConfigError("--device is cuda, and PyTorch sees no such device here")
    return torch.device(args.device or ("cuda" if available else "cpu"))


def _question(args: argparse.Namespace, platform: Platform) -> Question:
    if args.block_size < 1:
        raise ConfigError(f"--block-size is {args.block_size}, it must be at least 1")
    if args.model is not None:
        _, config = read_model(resolve_checkpoint(args.model))
        name, layers, stored = args.model, attention_specs(config), config.dtype
    else:
        name, layers, stored = _DEFAULT_NAME, [_DEFAULT_LAYER], "bfloat16"
    dtype = resolve_dtype(args.dtype, stored, platform)
    if args.kv_cache_dtype == "fp8":
        layers = [replace(layer, kv_cache_dtype=FP8) for layer in layers]
    return Question(platform, name, layers, dtype, args.block_size)


def _needs(question: Question, phase: Phase) -> list[AttentionNeeds]:
    """What a worker of that phase asks for; prompts come in chunks."""
    features = frozenset({Feature.PREFIX}) if phase is Phase.PREFILL else frozenset[Feature]()
    return [AttentionNeeds(layer, question.dtype, question.block_size, phase, features) for layer in question.layers]


def _measure(question: Question, device: torch.device, path: Path) -> None:
    """Measure every kind of layer and keep the results."""
    from rich.console import Console

    console, began = Console(stderr=True), time.monotonic()
    kinds = _needs(question, Phase.PREFILL)

    def report(line: str) -> None:
        console.print(f"{time.monotonic() - began:5.1f} s  {line}", markup=False, highlight=False, soft_wrap=True)

    for need in kinds:
        window = need.spec.sliding_window
        report(f"measuring on {question.platform}" + (f", window of {window} tokens" if window is not None else ""))
        record = measure(question.platform, device, need, report=report, budget_s=BUDGET_S / len(kinds))
        try:
            save_record(path, record)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    report(f"kept in {path}")


def _answer(question: Question, config: ServiceConfig, path: Path) -> Report:
    configured = {Phase.PREFILL: config.prefill.attention_backend, Phase.DECODE: config.decode.attention_backend}
    choices = {phase: _choose(question, phase, configured[phase], path) for phase in Phase}
    rows = _rows(question)
    return Report(question, choices, rows, {} if question.platform.simulated else dict(broken_libraries()))


def _choose(question: Question, phase: Phase, configured: str | None, path: Path) -> Choice:
    if configured is not None:
        get_backend(configured)  # a name that does not exist is a mistake, and no reason against the model
    needs = _needs(question, phase)
    try:
        chosen = select_by_kind(
            question.platform, needs, configured, lambda kinds: load_ranking(path, question.platform, kinds)
        ).values()
    except AttentionBackendError as error:
        return Choice((), "all refuse" if configured is None else str(error))
    names, reasons = (
        dict.fromkeys(getattr(selection, what) for selection in chosen) for what in ("backend", "because")
    )
    return Choice(tuple(backend.name for backend in names), "; ".join(reasons))


def _rows(question: Question) -> list[Row]:
    """Every backend; first those that are tried on the platform, in that order."""
    needs = {phase: _needs(question, phase) for phase in Phase}
    tried = [name for kinds in needs.values() for need in kinds for name in candidates(question.platform, need)]
    rows = []
    for name in dict.fromkeys([*tried, *BACKENDS]):
        evidence = get_backend(name).capabilities.evidence(question.platform)
        against = {phase: unsupported_reasons(name, question.platform, needs[phase]) for phase in Phase}
        if not all(against.values()):
            faults = get_backend(name).faults(question.platform)
            against = {phase: reasons or faults for phase, reasons in against.items()}
        rows.append(Row(name, evidence, against))
    return rows

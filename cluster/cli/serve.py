"""`baton serve MODEL`: `baton up --model MODEL`, as users of vLLM type it."""

from __future__ import annotations

import argparse

from cluster.cli import up
from cluster.cli.foreign_flags import UpParser
from workers.errors import ConfigError

PARSER = UpParser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    up.add_arguments(parser)
    parser.description = f"The same as `baton up --model MODEL`. {parser.description}"
    parser.add_argument("served", nargs="?", metavar="MODEL", help="checkpoint to serve, as --model has it")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.served is not None and args.model is not None:
        raise ConfigError(f"the model is given twice: {args.served} and --model {args.model}")
    args.model = args.model or args.served
    return up.run(args)

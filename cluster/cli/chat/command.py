"""The `baton chat` command."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import TextIO

from cluster.cli.chat.conversation import Conversation
from cluster.cli.chat.dialogue import HELP, Dialogue, Settings, typed_lines
from cluster.cli.chat.local_service import local_service
from cluster.cli.connection import add_connection_arguments, connection_of
from cluster.cli.generate import add_sampling_arguments, sampling_of
from cluster.client.client import BatonClient, Connection
from workers.errors import InvalidRequestError

_EPILOG = f"""\
in the conversation:
{HELP}

examples:
  baton chat                                         talks to the server that `baton up` started here
  baton chat --model ~/models/Qwen3-0.6B-Q8_0.gguf   starts one for this conversation, and stops it afterwards
  baton chat --system "Answer in French." --temperature 0.2
  printf 'My name is Ada.\\nWhat is my name?\\n' | baton chat

What is not given has the server's default: temperature 1, up to the end of the context window.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.description = (
        "Hold a conversation with a model: a line is a question, and the answer is printed as it comes. Questions may "
        "be piped in; then the first that fails ends the command."
    )
    parser.epilog = _EPILOG
    parser.add_argument(
        "--model", metavar="DIR|FILE.gguf|HUB_ID", help="start a service for this model here, and stop it at the end"
    )
    parser.add_argument("--prefill", metavar="N", default="1", help="with --model: prefill workers (default: 1)")
    parser.add_argument("--decode", metavar="N", default="1", help="with --model: decode workers (default: 1)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="with --model: any setting of `baton up`"
    )
    parser.add_argument("--system", metavar="TEXT", help="tell the model this first")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="of an answer (default: 600)")
    parser.add_argument("--stats", action="store_true", help="show token counts and timings behind each answer")
    parser.add_argument("--user", default="", metavar="NAME", help="whose requests they are; users take turns")
    add_connection_arguments(parser)
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    settings = Settings(sampling_of(args), args.timeout, args.user, args.stats)
    if args.timeout <= 0:
        raise InvalidRequestError(f"--timeout is {args.timeout:g}, it must be more than 0")
    if args.set and args.model is None:
        raise InvalidRequestError("--set is of the service that --model starts; there is no --model")
    with _connection(args) as connection, BatonClient(connection) as client:
        model = client.model_info(timeout_s=args.timeout)
        if not model.has_chat_template:
            raise InvalidRequestError(f"{model.name} has no chat template; use `baton generate`")
        interactive = sys.stdin.isatty()
        if interactive:
            print(f"{model.name}; /help lists commands, Ctrl-D ends", file=sys.stderr)
        dialogue = Dialogue(
            client, model, Conversation(args.system), settings, sys.stdout, sys.stderr, interactive=interactive
        )
        dialogue.run(typed_lines(">>> ") if interactive else _piped_lines(sys.stdin))
    return 0


@contextlib.contextmanager
def _connection(args: argparse.Namespace) -> Iterator[Connection]:
    if args.model is None:
        yield connection_of(args)
        return
    settings = [argument for setting in args.set for argument in ("--set", setting)]
    started = ["--model", args.model, "--prefill", args.prefill, "--decode", args.decode, *settings]
    with local_service(started) as address:
        yield Connection(address)


def _piped_lines(stdin: TextIO) -> Iterator[str]:
    try:
        yield from stdin
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"standard input is not UTF-8: byte {error.start} is wrong") from error

"""The `baton` command: finds the subcommand, runs it, and turns errors into one readable line."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from cluster.cli.exit_codes import EXIT_BROKEN_PIPE, EXIT_ERROR, EXIT_INTERRUPTED, EXIT_USAGE
from cluster.version import describe, is_client_alone
from workers.errors import BatonError

COMMANDS: dict[str, tuple[str, str]] = {
    "up": ("start the service here, in the foreground", "cluster.cli.up"),
    "generate": ("send a prompt and stream the answer", "cluster.cli.generate"),
    "chat": ("hold a conversation in the terminal", "cluster.cli.chat.command"),
    "status": ("show pools, workers, load and KV blocks", "cluster.cli.status"),
    "top": ("follow a service in the terminal, as its page does in a browser", "cluster.cli.top"),
    "scale": ("have pools grow or shrink while they serve", "cluster.cli.scale"),
    "explain": ("show where a request would go, and why", "cluster.cli.explain"),
    "plan": ("weigh every split of GPUs into prefill and decode workers", "cluster.cli.plan"),
    "backends": ("show which attention backends can run here, and which would be chosen", "cluster.cli.backends"),
    "doctor": ("prove the path that the KV cache takes between workers here", "cluster.cli.doctor.command"),
    "demo": ("start a small service, send it prompts, show where the time went, stop it", "cluster.cli.demo"),
    "bench": ("measure latency and throughput under load", "benchmarks.bench"),
    "serve": ("the same as `up --model MODEL`", "cluster.cli.serve"),
}
"""Name to (summary, module). A module is imported when it is needed: it has `add_arguments(parser)` and `run(args)`,
and may have a `PARSER` of its own."""

_DESCRIPTION = """\
usage: baton COMMAND [OPTIONS]

Baton serves large language models with prefill and decode on separate pools of workers.

commands:
{commands}

`baton COMMAND --help` says what a command takes. To begin with:
  baton up --model DIR|HUB_ID          in one terminal, and
  baton generate "The sky is"          in another

options:
  -h, --help     show this and exit
  --version      show the version and the commit, and exit
"""

_INCOMPLETE = "this needs {}, which baton-llm-client does not bring: pip install baton-llm in its place"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `baton` with these arguments (by default the process's own) and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help(), end="")
        return 0 if arguments else EXIT_USAGE
    if arguments[0] == "--version":
        print(f"baton {describe()}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        return _fail("baton", _unknown(name), EXIT_USAGE)
    return _run_command(name, arguments[1:])


def _run_command(name: str, arguments: Sequence[str]) -> int:
    try:
        module = importlib.import_module(COMMANDS[name][1])
        make_parser = getattr(module, "PARSER", argparse.ArgumentParser)
        parser = make_parser(f"baton {name}", formatter_class=argparse.RawDescriptionHelpFormatter)
        module.add_arguments(parser)
        code: int = module.run(parser.parse_args(arguments))
        sys.stdout.flush()
        return code
    except BatonError as error:
        return _fail(f"baton {name}", str(error), EXIT_ERROR)
    except ModuleNotFoundError as error:
        if not is_client_alone():
            raise
        return _fail(f"baton {name}", _INCOMPLETE.format(error.name), EXIT_ERROR)
    except KeyboardInterrupt:
        return _fail(f"baton {name}", "interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # Whoever read the output has gone; without this, Python complains once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


def _fail(program: str, message: str, code: int) -> int:
    print(f"{program}: {message}", file=sys.stderr)
    return code


def _help() -> str:
    return _DESCRIPTION.format(commands="\n".join(f"  {name:<12} {text}" for name, (text, _) in COMMANDS.items()))


def _unknown(name: str) -> str:
    if name.startswith("-"):
        return f"the command comes first, before options such as {name}; `baton --help` lists the commands"
    nearest = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"the commands are {', '.join(COMMANDS)}"
    return f"there is no command {name}; {hint}"


if __name__ == "__main__":
    sys.exit(main())

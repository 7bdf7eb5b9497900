"""A process that compiles grammars to see whether they can be: whoever runs it may end it when one takes too long.

The library that compiles bounds its own work nearly everywhere, but not everywhere: an integer that must be a multiple
of a million has it build a million states. It cannot be interrupted either. So nothing is compiled in a process that
others need before this one has shown that it can be. It reads one line of JSON for each, as `to_line` writes it, and
answers with a line: an error as a JSON string, or null.
"""

from __future__ import annotations

import json
import resource
import sys
from contextlib import suppress
from pathlib import Path

from workers.errors import InvalidRequestError
from workers.grammars.compiler import GrammarCompiler
from workers.structured_output import GrammarKind, StructuredOutput

MEMORY_LIMIT_BYTES = 4 * 2**30
"""Of address space, beyond what is taken before the first form."""


def to_line(wanted: StructuredOutput) -> bytes:
    """A form as the process reads it."""
    return json.dumps([wanted.kind.value, wanted.text, wanted.choices, wanted.disable_any_whitespace]).encode() + b"\n"


def from_line(line: bytes) -> StructuredOutput:
    """The inverse of `to_line`."""
    kind, text, choices, disable_any_whitespace = json.loads(line)
    return StructuredOutput(GrammarKind(kind), text, tuple(choices), disable_any_whitespace)


def main(folder: str, vocab_size: str, *eos_token_ids: str) -> None:
    """Answer until there are no more lines."""
    compiler = GrammarCompiler.of_checkpoint(Path(folder), int(vocab_size), tuple(map(int, eos_token_ids)))
    with suppress(InvalidRequestError):
        compiler.compile(StructuredOutput.choice(["a"]))  # loads the vocabulary, with whatever that takes
    limit = _address_space() + MEMORY_LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for line in sys.stdin.buffer:
        error = None
        try:
            compiler.compile(from_line(line))
        except InvalidRequestError as refused:
            error = str(refused)
        sys.stdout.buffer.write(json.dumps(error).encode() + b"\n")
        sys.stdout.buffer.flush()


def _address_space() -> int:
    """Bytes that the process has now."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main(*sys.argv[1:])

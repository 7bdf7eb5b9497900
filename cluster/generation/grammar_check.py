"""Whether a grammar can be compiled, found out in a process of its own, which is ended when that takes too long."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import sys
from collections import OrderedDict
from pathlib import Path

import workers
from cluster.caller import current_caller
from cluster.generation.turns import Turns
from workers.errors import InvalidRequestError
from workers.grammars.check import MEMORY_LIMIT_BYTES, to_line
from workers.structured_output import MAX_BYTES, StructuredOutput

COMPILE_LIMIT_S = 10.0
"""For one grammar, as long as it takes; who waits for others is not blamed for it."""
_START_LIMIT_S = 120.0
_KEPT = 1024
_MAX_WAIT_S = 60.0


class GrammarCheck:
    """Answers, for the vocabulary of one checkpoint, whether the workers can compile what a request asks for.

    The process is started when the first request asks. What it has found is kept, so that it is asked once.

    Args:
        folder: of the checkpoint.
        vocab_size: of the model.
        eos_token_ids: of the model.
        limit_s: for one grammar.
    """

    def __init__(
        self, folder: Path, vocab_size: int, eos_token_ids: tuple[int, ...], *, limit_s: float = COMPILE_LIMIT_S
    ) -> None:
        self._arguments = [str(folder), str(vocab_size), *map(str, eos_token_ids)]
        self._limit_s = limit_s
        self._turns = Turns(1, "for a grammar to be checked", max_wait_s=_MAX_WAIT_S)
        self._process: asyncio.subprocess.Process | None = None
        self._known: OrderedDict[bytes, str | None] = OrderedDict()

    async def check(self, wanted: StructuredOutput) -> None:
        """Return if the workers can compile it.

        Raises:
            InvalidRequestError: they cannot, or it takes too long or too much memory.
            QueueFullError: too many wait for theirs, or it would wait too long.
        """
        key = _digest(wanted)
        if key not in self._known:
            async with self._turns.turn(current_caller().client, wanted.num_bytes):
                if key not in self._known:
                    self._known[key] = await self._ask(wanted)
                    if len(self._known) > _KEPT:
                        self._known.popitem(last=False)
        self._known.move_to_end(key)
        if (error := self._known[key]) is not None:
            raise InvalidRequestError(error)

    async def aclose(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _ask(self, wanted: StructuredOutput) -> str | None:
        """What is wrong with it; None: nothing."""
        name = f"structured_output.{wanted.kind.value}"
        try:
            process = await self._started()
            answer = await asyncio.wait_for(_exchange(process, to_line(wanted)), self._limit_s)
        except TimeoutError:
            await self.aclose()
            return f"{name} takes longer to compile than the limit of {self._limit_s:g} s"
        except BaseException:  # cancelled, perhaps: the answer would be taken for the next one's
            await self.aclose()
            raise
        if not answer:
            await self.aclose()
            return f"{name} takes more memory to compile than the limit of {MEMORY_LIMIT_BYTES >> 30} GiB"
        error: str | None = json.loads(answer)
        return error

    async def _started(self) -> asyncio.subprocess.Process:
        """The process, ready to answer at once."""
        if self._process is None:
            root = str(Path(workers.__file__).parents[1])
            path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "workers.grammars.check", *self._arguments),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=4 * MAX_BYTES,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is for this process; that one ends with its input
            )
            first = to_line(StructuredOutput.choice(["a"]))  # loads the vocabulary, which is no grammar's fault
            await asyncio.wait_for(_exchange(self._process, first), _START_LIMIT_S)
        return self._process


def _digest(wanted: StructuredOutput) -> bytes:
    """What a form is remembered by: itself it may have 256 KiB."""
    parts = [wanted.kind.value, str(wanted.disable_any_whitespace), wanted.text, *wanted.choices]
    found = hashlib.blake2b(digest_size=32)
    for part in parts:
        data = part.encode(errors="surrogatepass")
        found.update(len(data).to_bytes(8, "little") + data)
    return found.digest()


async def _exchange(process: asyncio.subprocess.Process, line: bytes) -> bytes:
    """Send a line and return the next one; empty: the process is gone."""
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the process has no pipes")
    with contextlib.suppress(ConnectionError):
        process.stdin.write(line)
        await process.stdin.drain()
    return await process.stdout.readline()

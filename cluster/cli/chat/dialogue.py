"""Questions from the terminal, answers as they come: what is typed, what is printed, and what Ctrl-C means."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TextIO

from cluster.api import ModelInfo
from cluster.cli.chat.conversation import Conversation, Message
from cluster.cli.generate import stats
from cluster.client.client import BatonClient, BatonClientError
from cluster.client.messages import GenerateChunk
from workers.errors import BatonError, InvalidRequestError
from workers.messages import FinishReason
from workers.sampling_params import SamplingParams

HELP = """\
  /reset           forget what was said
  /system [TEXT]   tell the model this first, and forget what was said; without TEXT what its template says
  /stats           show or hide what each answer took
  /exit            end, as Ctrl-D does
  Ctrl-C           stop the answer; what has come of it stays in the conversation"""
_ANSWER_TOKENS = 256
"""So many tokens of the context window are kept free for an answer, where nothing says how long it may be."""
_TOKENS_OF_A_MESSAGE = 64
"""More than any template puts around one."""


@dataclass
class Settings:
    """How questions are asked.

    Attributes:
        sampling: of each answer.
        timeout_s: deadline of each answer.
        user: whose requests they are.
        stats: whether what an answer took is shown.
    """

    sampling: SamplingParams
    timeout_s: float
    user: str = ""
    stats: bool = False


class Dialogue:
    """A conversation with a model.

    Args:
        client: of its server.
        model: what is served.
        conversation: what was said before.
        settings: see there.
        out: where answers go.
        notes: where everything else goes.
        interactive: whether somebody types and looks on: then a failed question is told and the next one is awaited.
    """

    def __init__(
        self,
        client: BatonClient,
        model: ModelInfo,
        conversation: Conversation,
        settings: Settings,
        out: TextIO,
        notes: TextIO,
        interactive: bool,
    ) -> None:
        self._client = client
        self._model = model
        self._conversation = conversation
        self._settings = settings
        self._out = out
        self._notes = notes
        self._interactive = interactive
        self._commands: dict[str, Callable[[str], None]] = {
            "/reset": self._reset,
            "/system": self._system,
            "/stats": self._stats,
            "/help": lambda _: self._note(HELP),
        }

    def run(self, lines: Iterator[str]) -> None:
        """Answer line by line until there are no more, or one asks for the end.

        Raises:
            BatonError: a question failed, and nobody types.
        """
        for line in lines:
            text = line.strip()
            command, _, argument = text.partition(" ")
            if command in ("/exit", "/quit", "/bye"):
                return
            if command.startswith("/"):
                self._run_command(command, argument.strip())
            elif text:
                self._ask(text)

    def _run_command(self, command: str, argument: str) -> None:
        if command in self._commands:
            self._commands[command](argument)
        elif self._interactive:
            self._note(f"there is no {command}; /help lists what there is")
        else:
            raise InvalidRequestError(f"there is no {command}; there are {', '.join(self._commands)} and /exit")

    def _ask(self, text: str) -> None:
        self._conversation.ask(text)
        answer = ""
        try:
            messages, left_out = self._conversation.fitting(self._fits)
            if left_out:
                self._note(f"(the context window is full: the oldest {left_out} questions are left out)")
            for piece in self._pieces(messages):
                answer += piece
                self._out.write(piece)
                self._out.flush()
        except KeyboardInterrupt:
            self._note("\n(stopped)" if answer else "(stopped)")
        except BatonError as error:
            if not self._interactive:
                raise
            self._note(str(error))
        finally:
            self._conversation.answer(answer)
        if answer:
            print(file=self._out, flush=True)

    def _pieces(self, messages: list[Message]) -> Iterator[str]:
        """The answer as it comes. When this is left early, the request is cancelled."""
        chunks = self._client.generate(
            chat=messages,
            sampling=self._settings.sampling,
            timeout_s=self._settings.timeout_s,
            user=self._settings.user,
        )
        last: GenerateChunk | None = None
        try:
            for last in chunks:
                yield last.text
        finally:
            chunks.close()  # type: ignore[attr-defined]  # it is a generator
        if last is not None:
            self._note_end(last)

    def _note_end(self, last: GenerateChunk) -> None:
        if last.finish_reason is FinishReason.LENGTH:
            self._note("\n(cut off: the answer may not be longer)")
        if self._settings.stats and last.usage is not None:
            self._note("\n" + stats(last.usage, last.finish_reason, last.report))

    def _fits(self, messages: list[Message]) -> bool:
        """Whether a conversation leaves room for an answer in the context window."""
        window = self._model.max_model_len
        room = window - min(self._settings.sampling.max_tokens or _ANSWER_TOKENS, window // 2)
        if sum(len(content.encode()) + _TOKENS_OF_A_MESSAGE for _, content in messages) <= room:
            return True  # no token is less than a byte
        try:
            return len(self._client.tokenize(chat=messages, timeout_s=self._settings.timeout_s)) <= room
        except BatonClientError:
            return False  # far too long, or what is wrong with it is said when it is asked

    def _reset(self, _: str) -> None:
        self._conversation.forget()
        self._note("(forgotten)")

    def _system(self, text: str) -> None:
        self._conversation.system = text or None
        self._reset(text)

    def _stats(self, _: str) -> None:
        self._settings.stats = not self._settings.stats

    def _note(self, text: str) -> None:
        print(text, file=self._notes, flush=True)


def typed_lines(prompt: str) -> Iterator[str]:
    """Lines from a terminal until Ctrl-D; Ctrl-C drops the line that is typed."""
    import readline  # noqa: F401  (input() edits lines with it and remembers them)

    while True:
        try:
            yield input(prompt)
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit ends the conversation)", file=sys.stderr)

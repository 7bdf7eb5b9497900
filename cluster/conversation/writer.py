"""What parsers write an answer with: content, reasoning and calls, with the rules that all formats share."""

from __future__ import annotations

from collections.abc import Callable

from cluster.conversation.deltas import ArgumentsDelta, ContentDelta, Delta, ReasoningDelta, ToolCallStarted

_SPACE = " \t\r\n"


class AnswerWriter:
    """Collects an answer's deltas.

    Text may be *held* until it is known what it is: spaces at the end of content, the markers and the beginning of a
    call. A call that starts makes an end of what is held, and what is no call after all is content, as it was written.

    Args:
        new_id: makes the id of a call.
        max_calls: calls that the answer may have; what follows the last is dropped. None: any number.
        reasons: whether reasoning is told apart from content.
    """

    def __init__(self, new_id: Callable[[], str], max_calls: int | None = None, *, reasons: bool = True) -> None:
        self._new_id = new_id
        self._max_calls = max_calls
        self.reasons = reasons
        self._deltas: list[Delta] = []
        self._held = ""
        self._held_reasoning = ""
        self._has_reasoning = False
        self._after_call = False
        self._call_open = False
        self._all_whole = True
        self.num_calls = 0

    @property
    def done(self) -> bool:
        """Whether the answer has all the calls that it may have: nothing more is taken."""
        return self._max_calls is not None and self.num_calls >= self._max_calls and not self._call_open

    @property
    def calls_tools(self) -> bool:
        """Whether there are calls, and all of them are whole."""
        return self.num_calls > 0 and self._all_whole and not self._call_open

    def content(self, text: str) -> None:
        """Say more to the user, with all that is held."""
        if self.done or not text:
            return
        if not text.strip(_SPACE):
            self._held += text
            return
        text = self._held + text
        said = text.rstrip(_SPACE)
        self._held = text[len(said) :]
        if said:
            self._say(said)

    def hold(self, text: str) -> None:
        """Keep text of which it is not known yet what it is."""
        if not self.done:
            self._held += text

    def release(self) -> None:
        """What is held was content."""
        self.content_exactly("")

    def content_exactly(self, text: str) -> None:
        """Say more to the user, with all that is held and spaces at the end too."""
        if self.done:
            return
        text, self._held = self._held + text, ""
        if text:
            self._say(text)

    def drop(self) -> None:
        """What is held belongs to the format and not to the answer."""
        self._held = ""

    @property
    def held(self) -> str:
        """What is held."""
        return self._held

    @property
    def has_reasoning(self) -> bool:
        """Whether the model has thought anything."""
        return self._has_reasoning

    def reasoning(self, text: str) -> None:
        """Think more. Spaces at the beginning and the end of the reasoning are no part of it."""
        if not self.reasons:
            self.content(text)
            return
        text = self._held_reasoning + text
        thought = text.rstrip(_SPACE)
        self._held_reasoning = text[len(thought) :]
        if not self._has_reasoning:
            thought, self._held_reasoning = thought.lstrip(_SPACE), self._held_reasoning if thought else ""
        if thought:
            self._has_reasoning = True
            self._deltas.append(ReasoningDelta(thought))

    def end_reasoning(self) -> None:
        """The model has thought enough for now."""
        self._held_reasoning = ""

    def next_reasoning(self) -> None:
        """What it thinks next is a paragraph of its own."""
        self._held_reasoning = "\n" if self._has_reasoning else ""

    def start_call(self, name: str) -> None:
        """Begin a call; what is held belongs to it."""
        if self.done:
            return
        self._all_whole = self._all_whole and not self._call_open
        self._held = ""
        self._deltas.append(ToolCallStarted(self.num_calls, self._new_id(), name))
        self.num_calls += 1
        self._call_open = True

    def arguments(self, text: str) -> None:
        """Add to the arguments of the call that has begun."""
        if self._call_open and text:
            self._deltas.append(ArgumentsDelta(self.num_calls - 1, text))

    def end_call(self) -> None:
        """The call is whole."""
        self._call_open = False
        self._after_call = True

    def break_call(self) -> None:
        """The call cannot become whole; what follows is content."""
        if self._call_open:
            self._call_open = self._all_whole = False

    def finish(self) -> None:
        """The answer is over: what is held is content, except for spaces behind a call."""
        if self._after_call and not self._held.strip(_SPACE):
            self._held = ""
        self.release()

    def take(self) -> list[Delta]:
        """The deltas since the last time; neighbours of one kind are joined."""
        deltas, self._deltas = self._deltas, []
        if len(deltas) < 2:
            return deltas
        joined: list[Delta] = []
        for delta in deltas:
            before = joined[-1] if joined else None
            match before, delta:
                case ContentDelta(a), ContentDelta(b):
                    joined[-1] = ContentDelta(a + b)
                case ReasoningDelta(a), ReasoningDelta(b):
                    joined[-1] = ReasoningDelta(a + b)
                case ArgumentsDelta(i, a), ArgumentsDelta(j, b) if i == j:
                    joined[-1] = ArgumentsDelta(i, a + b)
                case _:
                    joined.append(delta)
        return joined

    def _say(self, text: str) -> None:
        self._after_call = False
        self._deltas.append(ContentDelta(text))

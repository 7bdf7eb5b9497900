"""What was said in a conversation, and as much of it as a context window holds."""

from __future__ import annotations

from collections.abc import Callable

Message = tuple[str, str]
"""Role and content."""


class Conversation:
    """Questions and answers in turns, behind what the model is told first.

    Attributes:
        system: what it is told first; None: what its chat template says.

    Args:
        system: see above.
    """

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self._turns: list[Message] = []

    def messages(self, first: int = 0) -> list[Message]:
        """All of it, from turn number `first` on."""
        return [*([] if self.system is None else [("system", self.system)]), *self._turns[first:]]

    def ask(self, text: str) -> None:
        """The user's turn."""
        self._turns.append(("user", text))

    def answer(self, text: str) -> None:
        """The model's turn. An answer of nothing takes back the question: a template wants turns to alternate."""
        if text:
            self._turns.append(("assistant", text))
        else:
            del self._turns[-1]

    def forget(self) -> None:
        """Begin anew."""
        self._turns.clear()

    def fitting(self, fits: Callable[[list[Message]], bool]) -> tuple[list[Message], int]:
        """As much of the end as fits, beginning with a question, and how many questions were left out.

        The last question always stays.
        """
        questions = [place for place, (role, _) in enumerate(self._turns) if role == "user"]
        for number, place in enumerate(questions):
            messages = self.messages(place)
            if place == questions[-1] or fits(messages):
                return messages, number
        return self.messages(), 0

"""How two workers meet: each moves data to the other, and a message goes there and back."""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Generator
from concurrent.futures import Future
from dataclasses import dataclass

from kv_transfer.errors import PeerError
from kv_transfer.messages import HandoffKey, Hello, encode
from kv_transfer.path_cost import PathCost
from kv_transfer.rehearsal import rehearse
from kv_transfer.transport import Transport

logger = logging.getLogger(__name__)

_ASK_AGAIN_S = 1.0


@dataclass(eq=False)
class _Meeting:
    peer: str
    steps: Generator[str, None, float]
    result: Future[float]
    hello: HandoffKey | None = None
    waits_for: str = "its turn"


class Introductions:
    """Every meeting with a peer. Used by the connector's owner thread only, except for reading `paths`.

    Args:
        transport: what carries data and messages.
        incarnation: of this engine.
    """

    def __init__(self, transport: Transport, incarnation: int) -> None:
        self._transport = transport
        self._incarnation = incarnation
        self._meetings: list[_Meeting] = []
        self._unanswered: set[HandoffKey] = set()
        self.paths: dict[str, PathCost] = {}
        """What the way to each peer costs, once it has been met."""

    @property
    def active(self) -> bool:
        """Whether anybody is being met."""
        return bool(self._meetings)

    def meet(self, peer: str, result: Future[float]) -> None:
        """Move data to a peer, have it move data here, and time a message there and back, for `result`."""
        self._meetings.append(_Meeting(peer, self._introduce(peer), result))

    def give_up(self, result: Future[float]) -> str:
        """Nobody waits for this result any more. Returns what the meeting still waited for."""
        given_up = [meeting for meeting in self._meetings if meeting.result is result]
        self._meetings = [meeting for meeting in self._meetings if meeting.result is not result]
        return given_up[0].waits_for if given_up else "nothing"

    def on_hello(self, sender: str, hello: Hello) -> None:
        """A peer introduces itself, or answers; it is answered when data has moved to it, once if it asks again."""
        if hello.reply:
            self._unanswered.discard(hello.key)
        elif not any(meeting.peer == sender and meeting.hello == hello.key for meeting in self._meetings):
            self._meetings.append(_Meeting(sender, self._welcome(sender, hello), Future(), hello.key))

    def peer_lost(self, engine_id: str) -> None:
        """A peer is gone; whoever waits to meet it does so in vain."""
        self.paths.pop(engine_id, None)
        for meeting in [meeting for meeting in self._meetings if meeting.peer == engine_id]:
            self._meetings.remove(meeting)
            meeting.result.set_exception(PeerError(f"{engine_id} is gone"))

    def progress(self) -> None:
        """Take every meeting one step further."""
        for meeting in list(self._meetings):
            try:
                meeting.waits_for = next(meeting.steps)
                continue
            except StopIteration as ended:
                meeting.result.set_result(ended.value)
            except PeerError as error:
                logger.warning("cannot meet %s: %s", meeting.peer, error)
                meeting.result.set_exception(error)
            except Exception as error:
                logger.exception("cannot meet %s", meeting.peer)
                meeting.result.set_exception(PeerError(f"cannot meet {meeting.peer}: {error}"))
            self._meetings.remove(meeting)

    def _introduce(self, peer: str) -> Generator[str, None, float]:
        yield from self._rehearse(peer)
        yield from self._ask(peer)  # the peer moves data here before it answers
        return (yield from self._ask(peer))

    def _welcome(self, peer: str, hello: Hello) -> Generator[str, None, float]:
        if peer not in self.paths:
            yield from self._rehearse(peer)
        self._transport.send(peer, encode(Hello(hello.key, reply=True)))
        return 0.0

    def _rehearse(self, peer: str) -> Generator[str, None, None]:
        ignored = encode(Hello(self._new_key(), reply=True))
        steps = rehearse(self._transport, peer, ignored)
        while True:
            try:
                next(steps)
            except StopIteration as ended:
                self.paths[peer] = ended.value
                return
            yield "data on its way there"

    def _ask(self, peer: str) -> Generator[str, None, float]:
        """Ask until there is an answer: a first message can get lost where both sides are just making connections.

        Returns:
            Seconds from the last time it was asked.
        """
        key = self._new_key()
        asked_at = -math.inf
        self._unanswered.add(key)
        try:
            while key in self._unanswered:
                if time.monotonic() >= asked_at + _ASK_AGAIN_S:
                    asked_at = time.monotonic()
                    self._transport.send(peer, encode(Hello(key, reply=False)))
                yield "its answer"
        finally:
            self._unanswered.discard(key)
        return time.monotonic() - asked_at

    def _new_key(self) -> HandoffKey:
        return HandoffKey(secrets.token_bytes(16), self._incarnation, 0)

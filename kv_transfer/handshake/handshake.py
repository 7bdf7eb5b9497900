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
from kv_transfer.handoff.messages import Hello, encode
from kv_transfer.handoff_key import HandoffKey
from kv_transfer.handshake.bandwidth_probe import probe_bandwidth
from kv_transfer.link_cost import LinkCost
from kv_transfer.transports.base import Transport

logger = logging.getLogger(__name__)

ASK_AGAIN_S = 1.0
"""From one question that is not answered to the next."""
_AWAKE_S = 0.2
"""After a message more are expected for so long: what a peer measures takes as long as this side takes to look."""


@dataclass(eq=False)
class _Handshake:
    peer: str
    steps: Generator[str, None, float]
    result: Future[float]
    hello: HandoffKey | None = None
    waits_for: str = "its turn"


class Handshakes:
    """Every meeting with a peer. Used by the connector's owner thread only, except for reading `paths`.

    Args:
        transport: what carries data and messages.
        incarnation: of this engine.
    """

    def __init__(self, transport: Transport, incarnation: int) -> None:
        self._transport = transport
        self._incarnation = incarnation
        self._handshakes: list[_Handshake] = []
        self._unanswered: set[tuple[str, HandoffKey]] = set()
        self._awake_until = -math.inf
        self.paths: dict[str, LinkCost] = {}
        """What the way to each peer costs, once it has been met."""

    @property
    def active(self) -> bool:
        """Whether anybody is being met, or has just been heard of."""
        return bool(self._handshakes) or time.monotonic() < self._awake_until

    def start(self, peer: str, result: Future[float]) -> None:
        """Move data to a peer, have it move data here, and time a message there and back, for `result`."""
        self._handshakes.append(_Handshake(peer, self._initiate(peer), result))

    def give_up(self, result: Future[float]) -> str:
        """Nobody waits for this result any more. Returns what the meeting still waited for."""
        given_up = [handshake for handshake in self._handshakes if handshake.result is result]
        self._handshakes = [handshake for handshake in self._handshakes if handshake.result is not result]
        return given_up[0].waits_for if given_up else "nothing"

    def on_hello(self, sender: str, hello: Hello) -> None:
        """A peer introduces itself, or answers; it is answered when data has moved to it, once if it asks again."""
        self._awake_until = time.monotonic() + _AWAKE_S
        if hello.reply:
            self._unanswered.discard((sender, hello.key))
        elif not any(handshake.peer == sender and handshake.hello == hello.key for handshake in self._handshakes):
            self._handshakes.append(_Handshake(sender, self._respond(sender, hello), Future(), hello.key))

    def peer_lost(self, engine_id: str) -> None:
        """A peer is gone; whoever waits to meet it does so in vain."""
        self.paths.pop(engine_id, None)
        for handshake in [handshake for handshake in self._handshakes if handshake.peer == engine_id]:
            self._handshakes.remove(handshake)
            handshake.result.set_exception(PeerError(f"{engine_id} is gone"))

    def progress(self) -> None:
        """Take every meeting one step further."""
        for handshake in list(self._handshakes):
            try:
                handshake.waits_for = next(handshake.steps)
                continue
            except StopIteration as ended:
                handshake.result.set_result(ended.value)
            except PeerError as error:
                logger.warning("cannot meet %s: %s", handshake.peer, error)
                handshake.result.set_exception(error)
            except Exception as error:
                logger.exception("cannot meet %s", handshake.peer)
                handshake.result.set_exception(PeerError(f"cannot meet {handshake.peer}: {error}"))
            self._handshakes.remove(handshake)

    def _initiate(self, peer: str) -> Generator[str, None, float]:
        yield from self._probe_bandwidth(peer)
        yield from self._ask(peer)  # the peer moves data here before it answers
        return (yield from self._ask(peer))

    def _respond(self, peer: str, hello: Hello) -> Generator[str, None, float]:
        if peer not in self.paths:
            yield from self._probe_bandwidth(peer)
        self._transport.send(peer, encode(Hello(hello.key, reply=True)))
        return 0.0

    def _probe_bandwidth(self, peer: str) -> Generator[str, None, None]:
        ignored = encode(Hello(self._new_key(), reply=True))
        steps = probe_bandwidth(self._transport, peer, ignored)
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
        self._unanswered.add((peer, key))
        try:
            while (peer, key) in self._unanswered:
                if time.monotonic() >= asked_at + ASK_AGAIN_S:
                    asked_at = time.monotonic()
                    self._transport.send(peer, encode(Hello(key, reply=False)))
                yield "its answer"
        finally:
            self._unanswered.discard((peer, key))
        return time.monotonic() - asked_at

    def _new_key(self) -> HandoffKey:
        return HandoffKey(secrets.token_bytes(16), self._incarnation, 0)

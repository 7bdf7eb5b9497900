"""The connector that pushes: the handoff protocol over a transport, on a thread of its own."""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial

import torch

from kv_transfer.connector import ConnectorEvent, KVConnector, ReadyEvent
from kv_transfer.errors import PeerError, ProtocolError
from kv_transfer.group_blocks import GroupBlocks
from kv_transfer.handoff.messages import Cancel, Closed, Final, Grant, Hello, Part, decode
from kv_transfer.handoff.receiver import HandoffReceiver
from kv_transfer.handoff.sender import HandoffSender
from kv_transfer.handoff_key import HandoffKey
from kv_transfer.handshake.handshake import Handshakes
from kv_transfer.layout import KVLayout
from kv_transfer.link_cost import LinkCost, layers_per_write
from kv_transfer.owner_thread import OwnerThread
from kv_transfer.region import regions_of
from kv_transfer.transports.base import EngineInfo, Transport

logger = logging.getLogger(__name__)


class PushConnector(KVConnector):
    """Decode reserves, prefill pushes, over any transport.

    All transport calls are made by one owner thread, because posting a WRITE can block for milliseconds and transports
    are not thread-safe. With `threaded=False` there is no thread: `poll` does the work, which suits tests.

    Args:
        transport: moves bytes and messages; must be new.
        drain_s: see `HandoffReceiver`.
        threaded: whether to start the owner thread.
    """

    def __init__(self, transport: Transport, *, drain_s: float = 1.0, threaded: bool = True) -> None:
        self._transport = transport
        self._drain_s = drain_s
        self._threaded = threaded
        self._owner = OwnerThread(self.progress, transport.close, threaded=threaded)
        self._events: deque[ConnectorEvent] = deque()
        self._wake: Callable[[], None] = lambda: None
        self._generation = 0

    def register_kv_caches(self, name: str, kv_caches: Sequence[torch.Tensor], layout: KVLayout) -> EngineInfo:
        """See `KVConnector.register_kv_caches`."""
        regions_of(kv_caches, layout)  # refused before anything is started
        self._incarnation = secrets.randbits(64)
        self._layout = layout
        engine_id = f"{name}.{self._incarnation:016x}"
        self._receiver = HandoffReceiver(self._transport, layout, self._drain_s, self._emit)
        self._handshakes = Handshakes(self._transport, self._incarnation)
        self._sender = HandoffSender(self._transport, layout, self._emit, self._handshakes.paths.get)
        self._owner.start(f"kv-connector-{name}")
        return self._owner.call(lambda: self._transport.register(engine_id, self._incarnation, kv_caches, layout))

    def connect(self, peer: EngineInfo, timeout_s: float) -> None:
        """See `KVConnector.connect`."""
        self._layout.check_compatible(peer.layout, peer.engine_id)
        self._owner.call(lambda: self._connect(peer), timeout_s)

    def new_endpoint(self, peer: EngineInfo, timeout_s: float) -> EngineInfo:
        """See `KVConnector.new_endpoint`."""
        self._layout.check_compatible(peer.layout, peer.engine_id)
        return self._owner.call(lambda: self._new_endpoint(peer.engine_id), timeout_s)

    @property
    def broken_peers(self) -> Mapping[str, str]:
        """See `KVConnector.broken_peers`."""
        return self._transport.broken_peers

    def probe(self, engine_id: str, timeout_s: float) -> float:
        """See `KVConnector.probe`."""
        result: Future[float] = Future()
        self._owner.post(lambda: self._handshakes.start(engine_id, result))
        give_up_at = time.monotonic() + timeout_s
        while not self._threaded and not result.done() and time.monotonic() < give_up_at:
            self.progress()
        try:
            return result.result(max(0.0, give_up_at - time.monotonic()))
        except TimeoutError as error:
            waited_for = self._owner.call(lambda: self._handshakes.give_up(result))
            if result.done():
                return result.result()
            raise PeerError(
                f"{engine_id} was not met within {timeout_s:g} s: still waiting for {waited_for}"
            ) from error

    def link_to(self, engine_id: str) -> LinkCost | None:
        """See `KVConnector.link_to`."""
        return self._handshakes.paths.get(engine_id)

    def disconnect(self, engine_id: str, confirmed_dead: bool = False) -> None:
        """See `KVConnector.disconnect`."""
        self._owner.post(lambda: self._peer_lost(engine_id, bool(confirmed_dead)))

    def expect(
        self, handoff_id: bytes, prefill_engine: str, blocks: Sequence[GroupBlocks], ready: ReadyEvent | None = None
    ) -> HandoffKey:
        """See `KVConnector.expect`."""
        if len(blocks) != len(self._layout.groups):
            raise ValueError(f"blocks of {len(blocks)} cache groups, the cache has {len(self._layout.groups)}")
        self._generation += 1
        key = HandoffKey(handoff_id, self._incarnation, self._generation)
        granted = tuple(blocks)
        self._owner.post(lambda: self._receiver.expect(key, prefill_engine, granted, ready))
        return key

    def cancel(self, key: HandoffKey) -> None:
        """See `KVConnector.cancel`."""
        self._owner.post(lambda: self._receiver.cancel(key))

    def begin(self, handoff_id: bytes, decode_engine: str) -> None:
        """See `KVConnector.begin`."""
        self._owner.post(lambda: self._sender.begin(handoff_id, decode_engine))

    def push(
        self,
        handoff_id: bytes,
        group: int,
        layers: range,
        first_block: int,
        src_blocks: Sequence[int],
        ready: ReadyEvent | None,
    ) -> None:
        """See `KVConnector.push`."""
        blocks = tuple(src_blocks)
        self._owner.post(lambda: self._sender.push(handoff_id, group, layers, first_block, blocks, ready))

    def layers_per_write(
        self,
        peer: str,
        group: int,
        layer_bytes: int,
        layer_s: float = 0.0,
        slack_s: float = 0.0,
        tail_s: float = 0.0,
    ) -> int:
        """See `KVConnector.layers_per_write`. Where ranks take turns by layer, a WRITE holds this one's of them."""
        path, share = self.link_to(peer), self._layout.share(group)
        if path is None or not share:
            return 1
        turns = share.step
        own = layers_per_write(path, len(share), layer_bytes, layer_s * turns, slack_s * turns, tail_s)
        return min(own * turns, self._layout.groups[group].num_layers)

    def finish(self, handoff_id: bytes, first_token: int, other_tokens: tuple[int, ...] = ()) -> None:
        """See `KVConnector.finish`."""
        finished_at = time.monotonic()
        self._owner.post(lambda: self._sender.finish(handoff_id, first_token, finished_at, other_tokens))

    def abort(self, handoff_id: bytes, reason: str) -> None:
        """See `KVConnector.abort`."""
        self._owner.post(lambda: self._sender.abort(handoff_id, reason))

    def poll(self) -> list[ConnectorEvent]:
        """See `KVConnector.poll`."""
        if not self._threaded:
            self.progress()
        events: list[ConnectorEvent] = []
        while self._events:
            events.append(self._events.popleft())
        return events

    def set_listener(self, wake: Callable[[], None]) -> None:
        """See `KVConnector.set_listener`."""
        self._wake = wake

    def close(self) -> None:
        """See `KVConnector.close`."""
        self._owner.stop()

    @property
    def num_open(self) -> int:
        """Handoffs that are not over, on either side, and grants whose request has not come."""
        return self._sender.num_open + self._receiver.num_open

    def progress(self) -> bool:
        """One round of the owner's work: commands, messages, transfers. Whether more is expected soon."""
        self._owner.run_commands()
        self._receive()
        self._sender.progress()
        self._receiver.progress()
        self._handshakes.progress()
        return self._sender.active or self._receiver.active or self._handshakes.active

    def _receive(self) -> None:
        for sender, data in self._transport.receive():
            self._owner.attempt(partial(self._dispatch, sender, data))

    def _dispatch(self, sender: str, data: bytes) -> None:
        try:
            message = decode(data)
        except ProtocolError as error:
            logger.warning("ignored a message from %s: %s", sender, error)
            return
        match message:
            case Part():
                self._receiver.on_part(sender, message)
            case Final():
                self._receiver.on_final(sender, message)
            case Closed():
                self._receiver.on_closed(sender, message)
            case Grant():
                self._sender.on_grant(sender, message)
            case Cancel():
                self._sender.on_cancel(sender, message)
            case Hello():
                self._handshakes.on_hello(sender, message)

    def _connect(self, peer: EngineInfo) -> None:
        self._transport.add_peer(peer)
        self._receiver.connected(peer.engine_id)

    def _new_endpoint(self, engine_id: str) -> EngineInfo:
        self._receive()  # what was said over the old connection still counts
        endpoint = self._transport.new_endpoint(engine_id)
        self._sender.reconnect(engine_id)
        self._receiver.reconnect(engine_id)
        self._handshakes.peer_lost(engine_id)
        return endpoint

    def _peer_lost(self, engine_id: str, confirmed_dead: bool) -> None:
        self._receive()  # what it said before it was lost still counts
        self._transport.remove_peer(engine_id)
        self._sender.peer_lost(engine_id)
        self._receiver.peer_lost(engine_id, confirmed_dead)
        self._handshakes.peer_lost(engine_id)

    def _emit(self, event: ConnectorEvent) -> None:
        self._events.append(event)
        self._wake()

"""The other process of the NIXL tests: a connector that does what it is told over a pipe."""

from __future__ import annotations

import sys
import time
from multiprocessing.connection import Client

import torch

from kv_transfer.layout import KVLayout
from kv_transfer.nixl.connector import NixlConnector

LAYOUT = KVLayout("mha", 4, 16, 2, 16, "float32")
NUM_BLOCKS = 64


class PeerCommands:
    def __init__(self, name: str) -> None:
        self.cache = torch.rand(4, NUM_BLOCKS, 2, 16, 2, 16)
        self.connector = NixlConnector(drain_s=0.2)
        self.engine = self.connector.register_kv_caches(name, self.cache, LAYOUT)

    def info(self):
        return self.engine

    def connect(self, peer):
        self.connector.connect(peer, 10.0)

    def probe(self, engine_id):
        return self.connector.probe(engine_id, 10.0)

    def expect(self, handoff_id, peer, blocks):
        return self.connector.expect(handoff_id, peer, blocks)

    def begin(self, handoff_id, peer):
        self.connector.begin(handoff_id, peer)

    def push(self, handoff_id, first_layer, last_layer, blocks):
        self.connector.push(handoff_id, range(first_layer, last_layer), 0, blocks, None)

    def finish(self, handoff_id, token):
        self.connector.finish(handoff_id, token)

    def blocks(self, blocks):
        return self.cache[:, list(blocks)].numpy()  # an array: torch would share memory instead of sending it

    def disconnect(self, engine_id):
        self.connector.disconnect(engine_id)

    def events(self, count, timeout_s=10.0):
        """The next `count` events."""
        events = []
        deadline = time.monotonic() + timeout_s
        while len(events) < count and time.monotonic() < deadline:
            events += self.connector.poll()
            time.sleep(0.001)
        return events


if __name__ == "__main__":
    commands = PeerCommands(sys.argv[1])
    with Client((sys.argv[2], int(sys.argv[3])), authkey=b"nixl-peer") as pipe:
        while True:
            try:
                method, args = pipe.recv()
            except EOFError:
                break
            try:
                pipe.send((True, getattr(commands, method)(*args)))
            except Exception as error:
                pipe.send((False, error))

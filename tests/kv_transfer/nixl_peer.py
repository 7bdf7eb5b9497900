"""The other process of the NIXL tests: a connector that does what it is told over a pipe.

Run with `ARGUMENTS` as a global: its name, its device, and the host and port to connect to.
"""

from __future__ import annotations

import time
from multiprocessing.connection import Client

import torch

from kv_transfer.group_blocks import GroupBlocks
from kv_transfer.layout import GroupLayout, KVLayout
from kv_transfer.lease import Lease, lease_clock
from kv_transfer.nixl_connector import NixlConnector

LAYOUT = KVLayout((GroupLayout("full", tuple(range(4)), 16, 2, 16, "float32"),))
NUM_BLOCKS = 64


class PeerCommands:
    def __init__(self, name: str, device: str) -> None:
        self.cache = torch.rand(4, NUM_BLOCKS, 2, 16, 2, 16).to(device)
        self.lease = Lease(duration_s=1.0)
        self.connector = NixlConnector(drain_s=0.2, may_write=self.lease.holds)
        self.engine = self.connector.register_kv_caches(name, [self.cache], LAYOUT)

    def info(self):
        return self.engine

    def connect(self, peer):
        self.connector.connect(peer, 10.0)

    def probe(self, engine_id):
        return self.connector.probe(engine_id, 10.0)

    def expect(self, handoff_id, peer, blocks, first_block=0):
        return self.connector.expect(handoff_id, peer, [GroupBlocks(first_block, blocks)])

    def begin(self, handoff_id, peer):
        self.connector.begin(handoff_id, peer)

    def push(self, handoff_id, first_layer, last_layer, blocks):
        ready = None
        if self.cache.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        self.connector.push(handoff_id, 0, range(first_layer, last_layer), 0, blocks, ready)

    def hand_over(self, handoff_id, peer, blocks, number):
        """All of a prefill worker's part: the blocks are filled with a number, and pushed in two groups."""
        self.fill(blocks, number)
        self.begin(handoff_id, peer)
        for first in (0, 2):
            self.push(handoff_id, first, first + 2, blocks)
        self.finish(handoff_id, number)

    def fill(self, blocks, number):
        self.cache[:, list(blocks)] = float(number)

    def numbers(self, blocks):
        """The different numbers in these blocks."""
        return self.cache[:, list(blocks)].unique().tolist()

    def abort(self, handoff_id):
        self.connector.abort(handoff_id, "the client gave up")

    def cancel(self, key):
        self.connector.cancel(key)

    def layers_per_write(self, engine_id, layer_bytes, layer_s):
        return self.connector.layers_per_write(engine_id, 0, layer_bytes, layer_s)

    def finish(self, handoff_id, token):
        self.connector.finish(handoff_id, token)

    def blocks(self, blocks):
        return self.cache[:, list(blocks)].cpu().numpy()  # an array: torch would share memory instead of sending it

    def disconnect(self, engine_id, may_write_s=0.0):
        self.connector.disconnect(engine_id, may_write_s)

    def renew_lease(self):
        """Has none until the first renewal, as if there were no gateway."""
        self.lease.renew(lease_clock())

    def events(self, count, timeout_s=10.0):
        """The next `count` events."""
        events = []
        deadline = time.monotonic() + timeout_s
        while len(events) < count and time.monotonic() < deadline:
            events += self.connector.poll()
            time.sleep(0.001)
        return events


def serve(name: str, device: str, host: str, port: int) -> None:
    commands = PeerCommands(name, device)
    with Client((host, port), authkey=b"nixl-peer") as pipe:
        while True:
            try:
                method, args = pipe.recv()
            except EOFError:
                break
            try:
                pipe.send((True, getattr(commands, method)(*args)))
            except Exception as error:
                pipe.send((False, error))


if __name__ == "__main__":
    serve(*globals()["ARGUMENTS"])

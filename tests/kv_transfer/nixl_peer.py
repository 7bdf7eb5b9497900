"""The other process of the NIXL tests: a connector that does what it is told over a pipe.

Run with `ARGUMENTS` as a global: its name, its device, the host and port to connect to, and its environment.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from dataclasses import replace
from multiprocessing.connection import Client

import torch

from kv_transfer.group_blocks import GroupBlocks
from kv_transfer.layout import GroupLayout, KVLayout
from kv_transfer.lease import Lease, lease_clock
from kv_transfer.nixl_connector import NixlConnector

LAYOUT = KVLayout((GroupLayout("full", tuple(range(4)), 16, 2, 16, "float32"),))
NUM_BLOCKS = 64


class PeerCommands:
    pipe_address: tuple[str, int]

    def __init__(self, name: str, device: str) -> None:
        self.cache = torch.rand(4, NUM_BLOCKS, 2, 16, 2, 16).to(device)
        self.lease = Lease(duration_s=1.0)
        self.connector = NixlConnector(drain_s=0.2, lease=self.lease)
        self.engine = self.connector.register_kv_caches(name, [self.cache], LAYOUT)

    def info(self):
        return self.engine

    def pretend(self, host):
        """To be on another machine, as far as others and this worker know."""
        transport = self.connector._transport
        transport._process = replace(transport._process, host=host)
        self.engine = transport._info = replace(self.engine, process=transport._process)

    def new_endpoint(self, peer):
        return self.connector.new_endpoint(peer, 10.0)

    def break_connections(self):
        """Shut down this process' TCP connections, as a middlebox that forgets them does; returns how many."""
        count = 0
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(number))) as connection:
                if connection.family == socket.AF_INET and connection.getpeername() != self.pipe_address:
                    connection.shutdown(socket.SHUT_RDWR)
                    count += 1
        return count

    def broken_peers(self):
        return self.connector.broken_peers

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

    def disconnect(self, engine_id, confirmed_dead=False):
        self.connector.disconnect(engine_id, confirmed_dead)

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


def serve(name: str, device: str, host: str, port: int, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    commands = PeerCommands(name, device)
    commands.pipe_address = (host, port)
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

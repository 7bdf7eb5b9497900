"""A prefill and a decode worker of several ranks in one process and one thread, stepped by hand.

Every rank computes with the whole model, so that what comes out is exactly what one rank gives: the subject is that the
ranks stay equal. The network between the pairs of ranks has its own delays and faults, and a rank's reports reach the
lead late, in any order between ranks.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from attention.kv_cache import as_stored
from cache_groups import unwritten_caches
from kv_transfer.connector import ConnectorEvent, ReadyEvent
from kv_transfer.local_connector import LocalConnector
from kv_transfer.transports.base import EngineInfo
from kv_transfer.transports.local import Faults, LocalFabric
from local_cluster import LocalCluster
from workers.commands import Abort, Command, Disconnect, Submit
from workers.decode_worker import DecodeWorker
from workers.grammars.compiler import GrammarCompiler
from workers.kv_cache.sizing import kv_layout
from workers.lockstep.connector import AgreedConnector
from workers.lockstep.lead import Lead
from workers.lockstep.replica import Replica, StepClock
from workers.messages import Load, WorkerEvent, WorkerRequest
from workers.models.causal_lm import CausalLM
from workers.prefill_worker import PrefillWorker
from workers.runner.model_runner import ModelRunner


class NeighbourCaches:
    """An `Exchange` of ranks that step one after the other, in the order in which they call it.

    What a neighbour was sent is what it had when it called, or, if it is still to take the step, what it has now: all
    were sent their shares before, and blocks are completed before anything else happens in a step.

    Args:
        caches: of every rank, by cache group.
        rank: this one.
        copies: neighbours that keep the same.
        calls: of all ranks, empty: by rank what it had at each of its calls.
    """

    def __init__(
        self,
        caches: Sequence[Sequence[torch.Tensor]],
        rank: int,
        copies: int,
        calls: Sequence[list[torch.Tensor]],
    ) -> None:
        self._caches, self._rank, self._copies, self._calls = caches, rank, copies, calls
        self.written: ReadyEvent | None = None
        self.num_layers = 0

    def complete(self, group: int, blocks: Sequence[int]) -> None:
        if not blocks:
            return
        index = list(blocks)
        own, call = self._caches[self._rank][group], len(self._calls[self._rank])
        self._calls[self._rank].append(own[:, index])
        first = self._rank - self._rank % self._copies
        for place in range(self._copies):
            if first + place != self._rank:
                called = self._calls[first + place]
                theirs = called[call] if len(called) > call else self._caches[first + place][group][:, index]
                layers = slice(place, None, self._copies)
                own[layers, index] = theirs[layers]
                self.num_layers += len(theirs[layers])


MakeWorker = Callable[[ModelRunner, AgreedConnector, StepClock, "NeighbourCaches | None"], PrefillWorker | DecodeWorker]


@dataclass
class DirectChannel:
    """A lead's channel to followers in the same thread: a step's input is carried out at once."""

    followers: list[Replica]
    on_report: Callable[[int, Any], None] = field(init=False)

    def listen(self, on_report: Callable[[int, Any], None], on_lost: Callable[[int], None]) -> None:
        self.on_report = on_report

    def send(self, step_input: object) -> None:
        for follower in self.followers:
            follower.run(pickle.loads(pickle.dumps(step_input)))


class Ranks:
    """One worker of several ranks, with the interface of a worker of one."""

    def __init__(
        self,
        name: str,
        size: int,
        model: CausalLM,
        num_blocks: int,
        fabric: LocalFabric,
        make: MakeWorker,
        seed: int,
        copies: int,
    ) -> None:
        self.random = random.Random(seed)
        self.connectors = [AgreedConnector(LocalConnector(fabric), rank) for rank in range(size)]
        self.engines: list[EngineInfo] = []
        self.replicas: list[Replica] = []
        self.exchanges: list[NeighbourCaches] = []
        calls: list[list[torch.Tensor]] = [[] for _ in range(size)]
        of_ranks = [unwritten_caches(model, num_blocks) for _ in range(size)]
        for rank, (connector, caches) in enumerate(zip(self.connectors, of_ranks, strict=True)):
            layout = kv_layout(model.kv_cache_groups, size, tp_rank=rank, copies=[copies] * len(model.kv_cache_groups))
            exchange = NeighbourCaches(of_ranks, rank, copies, calls) if copies > 1 else None
            self.exchanges += [exchange] if exchange is not None else []
            self.engines.append(connector.register_kv_caches(name, [as_stored(cache) for cache in caches], layout))
            clock = StepClock()
            worker = make(ModelRunner(model, caches), connector, clock, exchange)
            self.replicas.append(Replica(worker, connector, clock))
        self.channel = DirectChannel(self.replicas[1:])
        self.lead = Lead(self.replicas[0], self.connectors[0], self.channel, size, self._crashed)
        self.lead.listen(lambda: None)
        self.connectors[0].set_listener(lambda: None)  # the lead's own rank reports late, too
        self.unreported: list[list[ConnectorEvent]] = [[] for _ in range(size)]

    def add(self, request: WorkerRequest) -> None:
        self._take(Submit(request))

    def abort(self, attempt_id: str) -> None:
        self._take(Abort(attempt_id))

    def disconnect(self, engine_id: str) -> None:
        self._take(Disconnect(engine_id))

    def _take(self, command: Command) -> None:
        self.lead.take(command)

    @property
    def has_work(self) -> bool:
        return self.lead.has_work

    @property
    def has_requests(self) -> bool:
        return self.lead.has_work or any(replica.worker.has_requests for replica in self.replicas)

    @property
    def load(self) -> Load:
        return self.lead.load

    def step(self) -> list[WorkerEvent]:
        """Some ranks' connectors get a turn, some of what they say reaches the lead, and all ranks take a step."""
        for rank in self.random.sample(range(len(self.connectors)), self.random.randint(0, len(self.connectors))):
            pending = self.unreported[rank]
            pending += self.connectors[rank].take_own()
            count = self.random.randint(0, len(pending))
            self.channel.on_report(rank, pending[:count])
            del pending[:count]
        events = self.lead.step()
        assert len({replica.digest for replica in self.replicas}) == 1
        return events

    def assert_equal_ranks(self) -> None:
        loads = [replica.worker.load for replica in self.replicas]
        assert loads.count(loads[0]) == len(loads), loads
        assert self.lead.num_to_agree == 0

    @staticmethod
    def _crashed(error: BaseException) -> None:
        raise error


class LockstepCluster(LocalCluster):
    """A pair of workers of `size` ranks each, joined rank by rank.

    Every rank keeps the whole cache. With `copies` it counts as kept alike by so many neighbours, and each is sent a
    share of it.
    """

    def __init__(
        self,
        checkpoint: Path,
        *,
        size: int = 2,
        seed: int = 0,
        prefill_blocks: int = 64,
        decode_blocks: int = 64,
        max_num_batched_tokens: int = 256,
        decode_batched_tokens: int | None = None,
        max_num_seqs: int = 16,
        max_model_len: int = 512,
        faults: Faults | None = None,
        steps_ahead: int = 0,
        grammars: bool = False,
        copies: int = 1,
    ) -> None:
        super().__init__(checkpoint, num_prefill=0, num_decode=0, faults=faults)
        config = self.model.config

        def compiler() -> GrammarCompiler | None:
            """Each rank has its own."""
            vocabulary = (config.vocab_size, config.eos_token_ids)
            return GrammarCompiler.of_checkpoint(checkpoint, *vocabulary) if grammars else None

        def prefill(
            runner: ModelRunner, connector: AgreedConnector, clock: StepClock, exchange: NeighbourCaches | None
        ) -> PrefillWorker:
            return PrefillWorker(
                runner,
                connector,
                max_num_batched_tokens=max_num_batched_tokens,
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
                steps_ahead=steps_ahead,
                grammars=compiler(),
                clock=clock,
            )

        def decode(
            runner: ModelRunner, connector: AgreedConnector, clock: StepClock, exchange: NeighbourCaches | None
        ) -> DecodeWorker:
            return DecodeWorker(
                runner,
                connector,
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
                max_num_batched_tokens=decode_batched_tokens,
                steps_ahead=steps_ahead,
                grammars=compiler(),
                exchange=exchange,
                clock=clock,
            )

        self.sides = [
            Ranks("prefill-0", size, self.model, prefill_blocks, self.fabric, prefill, seed, copies),
            Ranks("decode-0", size, self.model, decode_blocks, self.fabric, decode, seed + 1, copies),
        ]
        for side, pool in zip(self.sides, (self.prefill, self.decode), strict=True):
            pool[side.engines[0].engine_id] = side
        for one, other in (self.sides, self.sides[::-1]):
            for connector in one.connectors:
                connector.handshake(other.engines, 1.0)

    def assert_equal_ranks(self) -> None:
        """What the ranks of a worker hold is the same on all of them, and nothing is left to agree on."""
        for side in self.sides:
            side.assert_equal_ranks()

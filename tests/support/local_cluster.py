"""A whole prefill/decode cluster in one process and one thread, stepped by hand."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from attention.kv_cache import as_stored
from attention.spec import Phase
from cache_groups import unwritten_caches
from kv_transfer.local_connector import LocalConnector
from kv_transfer.push_connector import PushConnector
from kv_transfer.transports.local import Faults, LocalFabric
from made_requests import worker_request
from workers.decode_worker import DecodeWorker
from workers.grammars.compiler import GrammarCompiler
from workers.kv_cache.sizing import kv_layout
from workers.messages import (
    DecodeReport,
    HandoffReport,
    RequestFailed,
    RequestPreempted,
    TokenOutput,
    WorkerEvent,
)
from workers.models.causal_lm import CausalLM
from workers.models.loader import load_model
from workers.prefill_worker import PrefillWorker
from workers.runner.model_runner import ModelRunner
from workers.sampling_params import SamplingParams


class LocalCluster:
    """Prefill and decode workers joined by a `LocalFabric`. `model` is shared: only the caches are apart.

    All of them go by `clock`, which the fixture of this name makes stand still.
    """

    clock = staticmethod(time.monotonic)

    def __init__(
        self,
        checkpoint: Path,
        *,
        num_prefill: int = 1,
        num_decode: int = 1,
        block_size: int = 16,
        prefill_blocks: int | Sequence[int] = 64,
        decode_blocks: int | Sequence[int] = 64,
        max_num_batched_tokens: int = 256,
        decode_batched_tokens: int | None = None,
        max_num_seqs: int = 16,
        max_model_len: int = 512,
        layers_per_write: int = 1,
        faults: Faults | None = None,
        connector_class: Callable[[LocalFabric], PushConnector] = LocalConnector,
        attention_backend: str | None = None,
        kv_cache_dtype: str = "auto",
        steps_ahead: int = 0,
        prefill_steps_ahead: int | None = None,
        device: str = "cpu",
        enforce_eager: bool = False,
        prefill_graphs: bool = True,
        dtype: str = "float32",
        enable_prefix_caching: bool = True,
        grammars: bool = False,
    ) -> None:
        by_phase = decode_batched_tokens is not None
        self.model = _model(checkpoint, block_size, attention_backend, kv_cache_dtype, device, dtype, by_phase)
        self.fabric = LocalFabric(faults)
        config = self.model.config
        compiler = GrammarCompiler.of_checkpoint(checkpoint, config.vocab_size, config.eos_token_ids)
        compiler = compiler if grammars else None
        self.failures: dict[str, Exception] = {}
        self.tokens: dict[str, list[TokenOutput]] = defaultdict(list)
        self.reports: dict[str, HandoffReport] = {}
        self.decode_reports: dict[str, DecodeReport] = {}
        self.preempted: list[str] = []
        self.random = random.Random(0)
        self.prefill: dict[str, PrefillWorker] = {}
        self.decode: dict[str, DecodeWorker] = {}
        infos, connectors = [], []
        for i in range(num_prefill):
            runner, connector, info = self._end(f"prefill-{i}", prefill_blocks, connector_class)
            self.prefill[info.engine_id] = PrefillWorker(
                runner,
                connector,
                max_num_batched_tokens=max_num_batched_tokens,
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
                layers_per_write=layers_per_write,
                steps_ahead=prefill_steps_ahead,
                enforce_eager=enforce_eager or not prefill_graphs,
                enable_prefix_caching=enable_prefix_caching,
                grammars=compiler,
                clock=self.clock,
            )
            infos.append(info)
            connectors.append(connector)
        for i in range(num_decode):
            runner, connector, info = self._end(f"decode-{i}", decode_blocks, connector_class)
            self.decode[info.engine_id] = DecodeWorker(
                runner,
                connector,
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
                max_num_batched_tokens=decode_batched_tokens,
                steps_ahead=steps_ahead,
                enforce_eager=enforce_eager,
                enable_prefix_caching=enable_prefix_caching,
                grammars=compiler,
                clock=self.clock,
            )
            infos.append(info)
            connectors.append(connector)
        for connector, own in zip(connectors, infos, strict=True):
            for peer in infos:
                if peer is not own:
                    connector.connect(peer, 1.0)

    def _end(self, name: str, num_blocks: int | Sequence[int], connector_class: Callable[[LocalFabric], PushConnector]):
        caches = unwritten_caches(self.model, num_blocks)
        connector = connector_class(self.fabric)
        info = connector.register_kv_caches(
            name, [as_stored(cache) for cache in caches], kv_layout(self.model.kv_cache_groups)
        )
        return ModelRunner(self.model, caches), connector, info

    def submit(
        self,
        request_id: str,
        prompt: list[int],
        sampling: SamplingParams,
        *,
        timeout_s: float = 600.0,  # kernels may be compiled meanwhile
        prefill: int | None = None,
        decode: int | None = None,
        cache_owner: str = "",
    ) -> bytes:
        """Send one request to a pair of workers, both at once, in either order; returns its handoff's id."""
        p = list(self.prefill)[prefill if prefill is not None else self.random.randrange(len(self.prefill))]
        d = list(self.decode)[decode if decode is not None else self.random.randrange(len(self.decode))]
        handoff_id, asked = self.random.randbytes(16), (request_id, prompt, sampling)
        both = {"handoff_id": handoff_id, "timeout_s": timeout_s, "cache_owner": cache_owner}
        sides: list[Callable[[], None]] = [
            lambda: self.prefill[p].add(worker_request(*asked, d, **both)),
            lambda: self.decode[d].add(worker_request(*asked, p, **both)),
        ]
        self.random.shuffle(sides)
        for side in sides:
            side()
        return handoff_id

    def submit_local(
        self,
        request_id: str,
        prompt: list[int],
        sampling: SamplingParams,
        *,
        timeout_s: float = 600.0,  # kernels may be compiled meanwhile
        decode: int = 0,
        num_output_tokens: int = 0,
    ) -> None:
        """Send one request to a decode worker, which computes the prompt itself."""
        self.decode[list(self.decode)[decode]].add(
            worker_request(
                request_id,
                prompt,
                sampling,
                handoff_id=self.random.randbytes(16),
                timeout_s=timeout_s,
                num_output_tokens=num_output_tokens,
            )
        )

    def abort(self, request_id: str) -> None:
        """As the gateway does: both sides are told."""
        for worker in (*self.prefill.values(), *self.decode.values()):
            worker.abort(request_id)

    def step(self) -> None:
        """One step of every worker, in random order; a failure on one side stops the other."""
        workers = [*self.prefill.values(), *self.decode.values()]
        self.random.shuffle(workers)
        for worker in workers:
            for event in worker.step():
                self.take(event)

    def take(self, event: WorkerEvent) -> None:
        """Note what a worker has said."""
        match event:
            case TokenOutput():
                self.tokens[event.request_id].append(event)
            case RequestFailed():
                self.failures.setdefault(event.request_id, event.error)
                self.abort(event.request_id)
            case RequestPreempted():
                self.preempted.append(event.request_id)
            case HandoffReport():
                self.reports[event.request_id] = event
            case DecodeReport():
                self.decode_reports[event.request_id] = event

    def run(self, max_steps: int = 20_000) -> dict[str, list[int]]:
        """Step until nothing is under way; the tokens of every request."""
        for _ in range(max_steps):
            if not self.busy:
                break
            self.step()
        else:
            raise AssertionError(f"still busy after {max_steps} steps: {self.loads}")
        return {request_id: self.token_ids(request_id) for request_id in self.tokens}

    def token_ids(self, request_id: str) -> list[int]:
        """What a client would have got: prefill's first token precedes all others."""
        return [output.token_id for output in self.tokens[request_id]]

    @property
    def busy(self) -> bool:
        """Whether anything is under way anywhere."""
        return any(w.has_requests or w.has_work for w in (*self.prefill.values(), *self.decode.values()))

    @property
    def loads(self) -> dict[str, object]:
        """Every worker's load."""
        return {engine_id: w.load for engine_id, w in (*self.prefill.items(), *self.decode.items())}

    def assert_all_blocks_free(self) -> None:
        """Nothing leaked on either side."""
        for engine_id, worker in (*self.prefill.items(), *self.decode.items()):
            assert worker.load.free_blocks == worker.load.total_blocks, (engine_id, worker.load)


_models: dict[tuple[Path, int, str | None, str, str, str, bool], CausalLM] = {}


def _model(
    checkpoint: Path, block_size: int, backend: str | None, kv_cache_dtype: str, device: str, dtype: str, by_phase: bool
) -> CausalLM:
    key = (checkpoint, block_size, backend, kv_cache_dtype, device, dtype, by_phase)
    if key not in _models:
        _models[key] = load_model(
            checkpoint,
            dtype,
            device,
            block_size,
            backend,
            phase=Phase.DECODE if by_phase else None,
            local_prefill=by_phase,
            kv_cache_dtype=kv_cache_dtype,
        )
    return _models[key]

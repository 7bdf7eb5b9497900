"""What a long prompt costs before a worker computes any of it: at the door, on its way, and on the thread that steps.

The thread that steps is the one that counts: while it looks at a prompt, no sequence of its worker has a token. It is
timed from being handed the request to the model being called with its first chunk. What is done at the door and while
unpickling runs on other threads, which only share the interpreter with it. Processor time of the one thread, so that
other processes of the machine do not count.
"""

from __future__ import annotations

import argparse
import json
import pickle
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.environment import RESULTS, Environment
from benchmarks.report import to_json, write_json
from cluster.routing.prefix_index import PromptPrefix
from kv_transfer.local_connector import LocalConnector
from kv_transfer.transports.local import LocalFabric
from workers.builder import build_worker
from workers.config import WorkerConfig
from workers.decode_worker import DecodeWorker
from workers.messages import WorkerRequest
from workers.prefill_worker import PrefillWorker
from workers.runner.model_runner import ModelRunner
from workers.sampling_params import SamplingParams
from workers.token_ids import as_token_ids
from workers.validation import check_token_ids

_VOCAB_SIZE = 128_256
_SAMPLING = SamplingParams(temperature=0.0, seed=0, max_tokens=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser("long_prompt", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tokens", type=int, default=131_072, metavar="N", help="of the prompt")
    parser.add_argument("--block-size", type=int, nargs="+", default=[16, 64], metavar="N")
    parser.add_argument("--repeats", type=int, default=30, metavar="N")
    parser.add_argument("--output", type=Path, default=RESULTS / "long_prompt.json", metavar="FILE")
    args = parser.parse_args(argv)
    environment = Environment.capture(1)
    torch.set_num_threads(1)
    cases = []
    for block_size in args.block_size:
        for role in ("prefill", "decode"):
            cases.append(measure(role, args.tokens, block_size, args.repeats))
            print(", ".join(f"{name} {_shown(value)}" for name, value in cases[-1].items()))
    config = {"tokens": args.tokens, "repeats": args.repeats}
    write_json(args.output, to_json("long_prompt", environment, config, {"cases": cases}))
    return 0


def measure(role: str, num_tokens: int, block_size: int, repeats: int) -> dict[str, Any]:
    """Medians in milliseconds, of a worker that has nothing else to do and caches blocks by content.

    Args:
        role: of the worker; a decode worker computes the prompt itself.
        num_tokens: of the prompt.
        block_size: of the worker.
        repeats: prompts, each unlike the others.
    """
    rng, times = random.Random(0), dict[str, list[float]]()
    worker = _worker(role, num_tokens, block_size)
    for number in range(repeats):
        ids = [rng.randrange(_VOCAB_SIZE) for _ in range(num_tokens)]
        request = _at_the_door(str(number), ids, block_size, times)
        pickled = _timed(times, "pickling_ms", partial(pickle.dumps, request, pickle.HIGHEST_PROTOCOL))
        arrived = _timed(times, "unpickling_ms", partial(pickle.loads, pickled))
        times.setdefault("step_thread_ms", []).append(_until_first_chunk(worker, arrived))
    known = {"role": role, "block_size": block_size, "pickled_bytes": len(pickled)}
    return known | {name: round(median(values), 4) for name, values in times.items()}


def _at_the_door(name: str, ids: list[int], block_size: int, times: dict[str, list[float]]) -> WorkerRequest:
    token_ids = _timed(times, "array_ms", lambda: as_token_ids(ids))
    _timed(times, "checking_ms", lambda: check_token_ids(token_ids, _VOCAB_SIZE))
    prefix = PromptPrefix(token_ids)
    _timed(times, "hashing_ms", lambda: prefix.prepare([block_size]))
    return WorkerRequest(
        request_id=name,
        attempt_id=name,
        handoff_id=bytes(16),
        prompt_token_ids=token_ids,
        sampling=_SAMPLING,
        timeout_s=600.0,
        peer_engine=None,
        block_hashes=prefix.carried(block_size),
    )


def _until_first_chunk(worker: PrefillWorker | DecodeWorker, request: WorkerRequest) -> float:
    """Milliseconds of this thread from being handed a request to the model's call."""
    called: list[float] = []

    def forward(runner: ModelRunner, rows: Sequence[Any], on_layer: object = None) -> torch.Tensor:
        called.append(time.thread_time())
        return torch.zeros(sum(row.wants_logits for row in rows), _VOCAB_SIZE)

    with patch.object(ModelRunner, "forward", forward):
        started = time.thread_time()
        worker.add(request)
        worker.step()
        worker.abort(request.attempt_id)
        while worker.has_requests:
            worker.step()
    return (called[0] - started) * 1e3


def _worker(role: str, num_tokens: int, block_size: int) -> PrefillWorker | DecodeWorker:
    """A worker with room for one such prompt, of a model that is next to nothing."""
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": _VOCAB_SIZE,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "max_position_embeddings": num_tokens + 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape), encoding="utf-8")
        config = WorkerConfig(
            f"{role}-0",
            role,
            folder,
            dtype="float32",
            load_format="dummy",
            block_size=block_size,
            num_blocks=num_tokens // block_size + 64,
            max_num_seqs=2,
            max_num_batched_tokens=512,
            local_prefill=role == "decode",
        )
        return build_worker(config, LocalConnector(LocalFabric())).worker


def _timed(times: dict[str, list[float]], name: str, work: Callable[[], Any]) -> Any:
    started = time.thread_time()
    result = work()
    times.setdefault(name, []).append((time.thread_time() - started) * 1e3)
    return result


def _shown(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())

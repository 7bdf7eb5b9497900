"""vLLM's engine at the points of `benchmarks.gpu_engine`, with the same driver.

    PYTHONPATH=<vLLM's packages> python -m benchmarks.peers.vllm_engine

Runs where vLLM is installed and Baton is not: it imports only what needs neither.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.engine_points import (
    TEMPERATURE,
    TOP_P,
    Plan,
    add_point_arguments,
    decode_rows,
    own_turn,
    plan_of,
    prefill_rows,
)
from benchmarks.environment import RESULTS, Environment, gpu_names
from benchmarks.model_shapes import MODEL_HELP, model_folder

_SCHEMA_VERSION = 1


def zero_biases(model: Any) -> int:
    """Set a model's biases to zero, those of its routers among them, and tell how many there were.

    vLLM's random weights and biases are alike in size, and its norms make what is multiplied a thousand times smaller:
    biases alone would decide, and every token would go to the same experts.
    """
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    for bias in biases:
        bias.data.zero_()
    return len(biases)


class VllmEngine:
    """vLLM's offline `LLM`, stepped by the caller, as a `MeasuredEngine`.

    Prefix caching is off, CUDA graphs and asynchronous scheduling are as vLLM sets them; no text is made of tokens.
    """

    def __init__(
        self, folder: Path, max_model_len: int, max_num_seqs: int, args: argparse.Namespace, vllm: Any
    ) -> None:
        self._vllm = vllm
        settings = {
            "model": str(folder.resolve()),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": args.dtype,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": args.max_num_batched_tokens,
            "block_size": args.block_size,
            "gpu_memory_utilization": args.gpu_memory_utilization,
            "enable_prefix_caching": False,
            "seed": 0,
        }
        if args.kv_cache_gb is not None:
            settings["kv_cache_memory_bytes"] = int(args.kv_cache_gb * 1e9)
        llm = vllm.LLM(**settings)
        self._engine = llm.llm_engine
        self.settings = {**settings, "model": folder.name, "zeroed_biases": sum(llm.apply_model(zero_biases))}

    def add(self, request_id: str, prompt: Sequence[int], max_tokens: int, sampled: bool) -> None:
        """See `MeasuredEngine.add`."""
        kind = importlib.import_module("vllm.sampling_params").RequestOutputKind.DELTA
        params = self._vllm.SamplingParams(
            temperature=TEMPERATURE if sampled else 0.0,
            top_p=TOP_P if sampled else 1.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=kind,
        )
        self._engine.add_request(request_id, {"type": "token", "prompt_token_ids": list(prompt)}, params)

    def step(self) -> int:
        """See `MeasuredEngine.step`."""
        return sum(len(choice.token_ids) for output in self._engine.step() for choice in output.outputs)

    @property
    def busy(self) -> bool:
        """See `MeasuredEngine.busy`."""
        return bool(self._engine.has_unfinished_requests())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser("vllm_engine", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--dtype", default="bfloat16", help="default: bfloat16")
    parser.add_argument("--model", type=Path, metavar="DIR", help=MODEL_HELP)
    parser.add_argument("--block-size", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9, metavar="SHARE", help="default: 0.9")
    parser.add_argument("--kv-cache-gb", type=float, metavar="GB", help="of the cache; default: what is found to fit")
    parser.add_argument("--run", default="", metavar="NAME", help="of the run that results belong to")
    parser.add_argument("--note", default="", help="what else is to be known of the run")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu_engine_vllm.json", metavar="FILE")
    add_point_arguments(parser)
    args = parser.parse_args(argv)
    environment = Environment.capture(threads=None)
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(args.model, Path(scratch))
        vocab_size = int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"])
        _measure(args, folder, plan_of(args, vocab_size), environment)
    return 0


def _measure(args: argparse.Namespace, folder: Path, plan: Plan, environment: Environment) -> None:
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # of `zero_biases`, to vLLM's own process
    vllm = importlib.import_module("vllm")
    began = time.perf_counter()
    seqs = max(point.batch for point in (*args.prefill, *args.decode, *args.sampled))
    longest = plan.longest(args.prefill, [*args.decode, *args.sampled])
    engine = VllmEngine(folder, longest, seqs, args, vllm)
    found: dict[str, Any] = {"start_up_s": time.perf_counter() - began, "prefill": [], "decode": []}
    points = ("prefill", "decode", "sampled", "output", "turn")
    config = {
        **{name: value for name, value in vars(args).items() if name not in points},
        "model": None if args.model is None else args.model.name,
        "engine": "vllm",
        "gpu_names": gpu_names(),
        "version": vllm.__version__,
        "settings": engine.settings,
    }

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def save() -> None:
        content = {"kind": "gpu_engine", "schema": _SCHEMA_VERSION, "environment": environment.to_json()}
        text = json.dumps({**content, "config": config, **found}, indent=1)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text + "\n", encoding="utf-8")

    report(f"started in {found['start_up_s']:.1f} s")
    with own_turn(args.turn):
        for row in prefill_rows(engine, args.prefill, plan, report):
            found["prefill"].append(row)
            save()
        for chosen, sampled in ((args.decode, False), (args.sampled, True)):
            for row in decode_rows(engine, chosen, plan, sampled, report):
                found["decode"].append(row)
                save()


if __name__ == "__main__":
    sys.exit(main())

"""Grammars' masks and several samples of a prompt on a GPU: the tokens are those of a CPU, in float32."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
import torch
from tokenizers import Tokenizer

from benchmarks.made_schemas import made_schema
from local_cluster import LocalCluster
from workers.messages import FinishReason
from workers.sampling_params import SamplingParams
from workers.structured_output import StructuredOutput

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SCHEMAS = 12
FAMILIES = {"llama": "TRITON_ATTN", "gemma2": "TRITON_ATTN", "deepseek_v2": "TRITON_MLA"}


def prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 250) for _ in range(length)]


def on_both(checkpoint: Any, backend: str, requests: dict[str, tuple[list[int], SamplingParams]], **sizes: Any) -> Any:
    """What a pair on a GPU answers, as its cluster, and the same on the CPU."""
    clusters = []
    for device, name in (("cuda", backend), ("cpu", None)):
        cluster = LocalCluster(
            checkpoint, device=device, attention_backend=name, steps_ahead=1, grammars=True, max_num_seqs=16, **sizes
        )
        for request_id, (token_ids, sampling) in requests.items():
            cluster.submit(request_id, token_ids, sampling)
        cluster.run()
        assert not cluster.failures
        cluster.assert_all_blocks_free()
        clusters.append(cluster)
    return clusters


def test_answers_to_schemas_are_valid_beside_free_ones(tiny_checkpoint: Any) -> None:
    checkpoint = tiny_checkpoint("llama")
    requests = {}
    for i in range(SCHEMAS):
        wanted = StructuredOutput.json_schema(made_schema(i, depth=2), disable_any_whitespace=True)
        sampling = SamplingParams(temperature=1.0, seed=i, max_tokens=400, structured_output=wanted)
        requests[f"json{i}"] = (prompt(9, i), sampling)
    requests["free"] = (prompt(12, 99), SamplingParams(temperature=0.0, seed=0, max_tokens=40, ignore_eos=True))
    requests["biased"] = (
        prompt(12, 98),
        SamplingParams(temperature=0.9, seed=4, max_tokens=40, logit_bias=((17, 4.0),)),
    )
    gpu, cpu = on_both(checkpoint, "TRITON_ATTN", requests, decode_blocks=600, prefill_blocks=300)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    for i in range(SCHEMAS):
        assert gpu.tokens[f"json{i}"][-1].finish_reason is FinishReason.STOP
        text = tokenizer.decode(gpu.token_ids(f"json{i}"), skip_special_tokens=True)
        jsonschema.validate(json.loads(text), made_schema(i, depth=2))
    assert {name: gpu.token_ids(name) for name in requests} == {name: cpu.token_ids(name) for name in requests}


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_of_one_prompt(family: str, tiny_checkpoint: Any) -> None:
    sampling = SamplingParams(temperature=1.2, seed=7, n=3, max_tokens=16, ignore_eos=True)
    requests = {"half": (prompt(27, 0), sampling), "full": (prompt(48, 1), sampling)}
    gpu, cpu = on_both(tiny_checkpoint(family), FAMILIES[family], requests)
    for name in requests:
        answers = [[(o.index, o.token_id) for o in cluster.tokens[name]] for cluster in (gpu, cpu)]
        assert sorted(answers[0]) == sorted(answers[1])
        assert len({tuple(token for i, token in answers[0] if i == index) for index in range(3)}) == 3

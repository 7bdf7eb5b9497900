"""The models that come with Baton: how they are found, how large they are, and that a pair of workers answers right."""

from __future__ import annotations

import json
import random

import pytest

from cluster.recall import SHIPPED_MODEL, SHIPPED_MODELS, checkpoint_named, is_shipped, recall_prompt
from cluster.text.tokenizer import Tokenizer
from local_cluster import LocalCluster
from workers.sampling_params import SamplingParams

MOST_BYTES = 8e6


@pytest.mark.parametrize("name", SHIPPED_MODELS)
def test_the_answer_comes_out_of_the_cache_that_was_handed_over(name: str) -> None:
    folder = SHIPPED_MODELS[name]
    tokenizer, rng = Tokenizer.load(folder), random.Random(7)
    cluster = LocalCluster(folder, prefill_blocks=128, decode_blocks=128, dtype="float32")
    asked = {f"r{entries}": recall_prompt(rng, entries) for entries in (8, 64)}
    greedy = SamplingParams(temperature=0.0, seed=0, max_tokens=8)
    for request_id, prompt in asked.items():
        cluster.submit(request_id, tokenizer.encode(prompt.text), greedy)
    cluster.run()
    for request_id, prompt in asked.items():
        assert tokenizer.decode(cluster.token_ids(request_id)).strip() == prompt.answer
        assert cluster.reports[request_id].num_bytes > 0


@pytest.mark.parametrize("name", SHIPPED_MODELS)
def test_they_are_small(name: str) -> None:
    assert sum(path.stat().st_size for path in SHIPPED_MODELS[name].glob("*.safetensors")) <= MOST_BYTES


def test_one_has_latents_and_four_experts() -> None:
    config = json.loads((SHIPPED_MODELS["recall-mla"] / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert (config["n_routed_experts"], config["num_experts_per_tok"]) == (4, 2)
    assert config["kv_lora_rank"] + config["qk_rope_head_dim"] == 160


def test_they_go_by_their_names(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert checkpoint_named(None) == str(SHIPPED_MODEL)
    assert checkpoint_named("recall-mla") == str(SHIPPED_MODELS["recall-mla"])
    assert is_shipped(None)
    assert is_shipped("recall-mla")
    assert is_shipped(str(SHIPPED_MODEL))
    (tmp_path / "recall-mla").mkdir()  # a folder of that name is meant
    assert checkpoint_named("recall-mla") == "recall-mla"
    for name in ("recall-mla", "org/recall", str(tmp_path)):
        assert checkpoint_named(name) == name
        assert not is_shipped(name)

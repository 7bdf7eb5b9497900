"""Models over caches of a backend's own layout, through both workers and the handoff between them."""

from __future__ import annotations

import dataclasses
import logging
from types import SimpleNamespace

import pytest
import torch

from attention.kv_cache import as_stored
from attention.platform import Platform
from attention.selection.registry import get_backend
from attention.selection.selector import force_attn_backend
from attention.spec import AttentionNeeds, AttentionSpec, Phase
from kv_transfer.errors import LayoutMismatchError
from kv_transfer.layout import GroupLayout
from kv_transfer.local_connector import LocalConnector
from kv_transfer.transports.local import LocalFabric
from odd_caches import REGISTRY
from paged_run import PagedRun
from workers.errors import ConfigError
from workers.kv_cache.sizing import kv_layout
from workers.layers.rotation import FusedRotation
from workers.models import attention_backend
from workers.models.attention_backend import choose_backends
from workers.models.causal_lm import attention_specs
from workers.models.loader import load_model, load_weights, weight_map
from workers.models.registry import read_model
from workers.sampling_params import SamplingParams

NAMES = ("HEADS_FIRST", "HEADS_OUTSIDE")
FULL = AttentionSpec(8, 2, 64, 0.125)
WINDOW = AttentionSpec(8, 2, 64, 0.125, sliding_window=128)
CPU = torch.device("cpu")
MIXED = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
"""Of a Qwen2 whose first layer sees everything."""


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr("attention.selection.registry.BACKENDS", REGISTRY)


def prompt(length, seed=0):
    return torch.randint(3, 500, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_the_handoff_carries_a_cache_of_another_layout(name, tiny_checkpoint, local_cluster, reference_greedy):
    cluster = local_cluster(tiny_checkpoint("llama"), attention_backend=name, max_num_batched_tokens=32)
    prompts = {f"r{i}": prompt(length, i) for i, length in enumerate((1, 16, 17, 70))}
    prompts["again"] = prompts["r3"][:60] + prompt(5, 9)
    for request_id, tokens in prompts.items():
        cluster.submit(request_id, tokens, SamplingParams(temperature=0.0, seed=0, max_tokens=8, ignore_eos=True))
    expected = {r: reference_greedy(tiny_checkpoint("llama"), tokens, 8) for r, tokens in prompts.items()}
    assert cluster.run() == expected, cluster.failures
    assert cluster.reports["r3"].num_bytes == 5 * cluster.model.kv_cache_groups[0].bytes_per_block
    cluster.assert_all_blocks_free()


@pytest.mark.parametrize(("here", "there"), [("HEADS_FIRST", "CPU_ATTN"), ("CPU_ATTN", "HEADS_OUTSIDE")])
def test_workers_whose_caches_are_laid_out_in_different_ways_refuse_each_other(here, there, tiny_checkpoint):
    fabric, infos, connectors = LocalFabric(), [], []
    for name, backend in (("prefill-0", here), ("decode-0", there)):
        (spec,) = load_model(tiny_checkpoint("llama"), "float32", backend_name=backend).kv_cache_groups
        connectors.append(LocalConnector(fabric))
        infos.append(connectors[-1].register_kv_caches(name, [as_stored(spec.allocate(4, "cpu"))], kv_layout([spec])))
    orders = {"CPU_ATTN": "kv,slot,head,element"}
    first, second = (orders.get(backend, "kv,head,slot,element") for backend in (here, there))
    with pytest.raises(LayoutMismatchError, match=f"order is {first} here and {second} there"):
        connectors[0].connect(infos[1], 1.0)


def test_a_layout_says_how_many_bytes_a_block_has(tiny_checkpoint):
    (spec,) = load_model(tiny_checkpoint("llama"), "float32", backend_name="HEADS_FIRST").kv_cache_groups
    (layout,) = kv_layout([spec]).groups
    assert layout.block_bytes * spec.num_layers == spec.bytes_per_block
    assert layout.block_shape == (2, 2, 16, 16)
    assert GroupLayout("mla", (0, 1, 2), 64, 1, 576, "bfloat16").block_bytes == 64 * 576 * 2
    latents = dataclasses.replace(spec, num_kv_heads=1, head_size=576, block_size=64, kind="mla", backend=None)
    (layout,) = kv_layout([latents]).groups
    assert (layout.kind, layout.order, layout.block_shape) == ("mla", "slot,element", (64, 576))


@pytest.mark.parametrize("name", [*NAMES, "CPU_ATTN"])
def test_keys_are_stored_by_the_rotation_only_where_the_backend_lets_it(
    name, tiny_checkpoint, reference_greedy, monkeypatch
):
    stored = []

    class Watched(FusedRotation):
        def apply(self, qkv, prepared, qk_norm, cache):
            stored.append(cache is not None)
            return super().apply(qkv, prepared, qk_norm, cache)

    monkeypatch.setattr("workers.layers.rotation.make_rotation", Watched)
    folder = tiny_checkpoint("qwen3")
    model = load_model(folder, "float32", backend_name=name)
    prompts = [prompt(20, 1), prompt(3, 2)]
    answers = PagedRun(model, num_sequences=2, max_tokens=40).greedy(prompts, 6)
    assert answers == [reference_greedy(folder, tokens, 6) for tokens in prompts]
    assert any(stored) is (name == "CPU_ATTN")


class TestByKind:
    """Each kind of layer has the backend that is best for it."""

    def needs(self, *specs, phase=None, dtype=torch.bfloat16):
        return [AttentionNeeds(spec, dtype, 16, phase) for spec in specs]

    def on(self, monkeypatch, name):
        monkeypatch.setattr(attention_backend, "Platform", SimpleNamespace(of=lambda _: Platform.simulate(name)))

    def test_a_window_backend_beside_a_full_one(self, monkeypatch, caplog):
        self.on(monkeypatch, "sm90")
        with caplog.at_level(logging.INFO):
            chosen = choose_backends(self.needs(FULL, WINDOW, phase=Phase.PREFILL), CPU)
        assert {spec: backend.name for spec, backend in chosen.items()} == {FULL: "FLASH_ATTN", WINDOW: "FLASHINFER"}
        assert [record.getMessage() for record in caplog.records] == [
            "attention backend of prefill, layers without a window: FLASH_ATTN (first by priority)",
            "attention backend of prefill, layers with a window of 128: FLASHINFER (first by priority)",
        ]

    def test_a_worker_of_both_phases_has_a_pair_for_each_kind(self, monkeypatch):
        self.on(monkeypatch, "sm90")
        chosen = choose_backends(self.needs(FULL, WINDOW, phase=Phase.DECODE), CPU, local_prefill=True)
        assert [backend.name for backend in chosen.values()] == [
            "TRITON_ATTN, prefill FLASH_ATTN",
            "TRITON_ATTN, prefill FLASHINFER",
        ]

    @pytest.mark.parametrize("in_code", [True, False])
    def test_a_name_is_for_all_kinds_and_must_do_all(self, in_code, monkeypatch):
        def choose(name, *specs):
            kinds = self.needs(*specs, dtype=torch.float32)
            if not in_code:
                return choose_backends(kinds, CPU, name=name)
            with force_attn_backend(name):
                return choose_backends(kinds, CPU)

        assert set(choose("TORCH_SDPA", FULL, WINDOW).values()) == {get_backend("TORCH_SDPA")}
        with pytest.raises(ConfigError, match="FULL_ONLY cannot run this model: no windows"):
            choose("FULL_ONLY", FULL, WINDOW)

    def test_kinds_need_not_agree_on_a_layout(self, monkeypatch):
        monkeypatch.setattr("attention.selection.selector.candidates", lambda *_: ("FULL_ONLY", "CPU_ATTN"))
        both = choose_backends(self.needs(FULL, WINDOW, dtype=torch.float32), CPU)
        assert [backend.name for backend in both.values()] == ["FULL_ONLY", "CPU_ATTN"]

    def test_each_layer_holds_its_own(self, tiny_checkpoint, reference_greedy):
        folder = tiny_checkpoint("qwen2", **MIXED)
        model_class, config = read_model(folder)
        full, window = attention_specs(config)
        assert (full.sliding_window, window.sliding_window) == (None, 16)
        backends = {full: get_backend("TORCH_SDPA"), window: get_backend("FLEX_ATTENTION")}
        model = model_class(config, backends, 16, torch.float32, CPU)
        with torch.inference_mode():
            load_weights(model, weight_map(model_class, config), folder)
            model.process_weights()
        assert [layer.self_attention.attention.backend.name for layer in model.layers] == ["TORCH_SDPA"] + [
            "FLEX_ATTENTION"
        ] * 2
        assert model.backend_names == "TORCH_SDPA; FLEX_ATTENTION"
        prompts = [prompt(40, 1), prompt(3, 2)]
        answers = PagedRun(model, num_sequences=2, max_tokens=60).greedy(prompts, 6)
        assert answers == [reference_greedy(folder, tokens, 6) for tokens in prompts]

    def test_layers_of_unlike_layouts_have_cache_groups_of_their_own(self, tiny_checkpoint, reference_greedy):
        folder = tiny_checkpoint("qwen2", **MIXED)
        model_class, config = read_model(folder)
        full, window = attention_specs(config)
        backends = {full: get_backend("TORCH_SDPA"), window: get_backend("HEADS_FIRST")}
        model = model_class(config, backends, 16, torch.float32, CPU)
        with torch.inference_mode():
            load_weights(model, weight_map(model_class, config), folder)
            model.process_weights()
        assert [spec.layers for spec in model.kv_cache_groups] == [(0,), (1, 2)]
        assert model.kv_cache_groups[0].layout != model.kv_cache_groups[1].layout
        answer = PagedRun(model, num_sequences=1, max_tokens=60).greedy([prompt(40, 1)], 6)
        assert answer == [reference_greedy(folder, prompt(40, 1), 6)]

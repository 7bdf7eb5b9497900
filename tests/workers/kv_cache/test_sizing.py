"""How large a KV cache becomes."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from attention.kv_cache import KVCacheSpec
from workers.config import WorkerConfig
from workers.errors import ConfigError
from workers.kv_cache.cache_split import CacheSplit
from workers.kv_cache.gpu_memory import GpuMemory, measure_gpu_memory
from workers.kv_cache.sizing import allocate_kv_caches, kv_layout, plan_kv_cache
from workers.models.loader import load_model
from workers.runner.profile_run import decode_rows, largest_batches_of, prefill_rows

GB = 10**9
SPEC = KVCacheSpec(layers=tuple(range(32)), num_kv_heads=8, head_size=128, block_size=64, dtype=torch.bfloat16)
BLOCK = SPEC.bytes_per_block
ROW_SPEC = KVCacheSpec((0, 1), 2, 16, 16, torch.float32)
EIGHT_B = GpuMemory(total=140 * GB, free=123 * GB, allocated=16 * GB, reserved=16 * GB, peak=20 * GB)
"""A model of 16 GB alone on a card: 1 GB of CUDA, 4 GB of activations."""

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_gpu(role: str = "decode", **settings) -> WorkerConfig:
    return WorkerConfig(f"{role}-0", role, "m", device="cuda", max_num_seqs=256, **settings)


@pytest.fixture
def measured(monkeypatch):
    """`measured(memory)`: a GPU on which that is found."""
    return lambda memory: monkeypatch.setattr("workers.kv_cache.sizing.measure_gpu_memory", lambda device, run: memory)


def test_the_cache_takes_what_the_share_leaves(measured):
    measured(EIGHT_B)
    plan = plan_kv_cache(on_gpu(), [SPEC], 8192)
    assert plan.num_blocks == (126 * GB - 20 * GB - 1 * GB - 768 * 2**20) // BLOCK
    assert plan.num_tokens == plan.num_blocks * 64
    assert plan.kv_bytes == plan.num_blocks * BLOCK
    text = str(plan)
    assert "model 16.00 GB, activations 4.00 GB, CUDA 1.00 GB" in text
    assert f"KV cache {plan.kv_bytes / GB:.2f} GB: {plan.num_blocks} blocks, {plan.num_tokens} tokens" in text


def test_two_workers_on_one_card_take_a_share_each_in_any_order(measured):
    """The second sees a card that the first has filled to its share; both get the same."""
    measured(EIGHT_B)
    first = plan_kv_cache(on_gpu(gpu_memory_utilization=0.45), [SPEC], 8192)
    used_by_first = EIGHT_B.peak + EIGHT_B.context + first.kv_bytes
    beside = dataclasses.replace(EIGHT_B, free=EIGHT_B.free - used_by_first)
    assert beside.context == 1536 * 2**20  # what lies outside torch is mostly the other's: no more is counted than this
    measured(beside)
    second = plan_kv_cache(on_gpu(gpu_memory_utilization=0.45), [SPEC], 8192)
    assert 0 <= first.num_blocks - second.num_blocks <= GB // BLOCK
    assert first.kv_bytes + second.kv_bytes + 2 * (EIGHT_B.peak + EIGHT_B.context) <= 0.9 * EIGHT_B.total


def test_it_is_never_more_than_is_free(measured):
    crowded = dataclasses.replace(EIGHT_B, free=30 * GB)
    measured(crowded)
    plan = plan_kv_cache(on_gpu(), [SPEC], 8192)
    assert plan.kv_bytes <= 30 * GB - 4 * GB


def test_it_is_no_larger_than_a_full_batch_can_use(measured):
    measured(EIGHT_B)
    assert plan_kv_cache(on_gpu(), [SPEC], 640).num_blocks == 256 * 10


@pytest.mark.parametrize(
    ("settings", "memory", "message"),
    [
        (
            {"gpu_memory_utilization": 0.1},
            EIGHT_B,
            r"weights \(16\.00 GB\), activations \(4\.00 GB\) and CUDA \(1\.00 GB\) take 21\.00 GB, its share of the "
            r"GPU is 14\.00 GB \(0\.1 of 140\.00 GB\).*raise decode\.gpu_memory_utilization",
        ),
        ({}, dataclasses.replace(EIGHT_B, free=4 * GB), r"4\.00 GB of the GPU's 140\.00 GB are free and leave no"),
        (
            {"gpu_memory_utilization": 0.163},
            EIGHT_B,
            r"KV cache of 120 blocks of 64 tokens \(0\.163 of 140\.00 GB, 21\.00 GB of it taken.*max_model_len 8192 "
            r"\(128 blocks\); enlarge decode\.gpu_memory_utilization",
        ),
        ({"num_blocks": 20_000}, EIGHT_B, r"20000 blocks takes 167\.77 GB, 118\.\d\d GB .*lower decode\.num_blocks"),
        ({"kv_cache_bytes": 130 * GB}, EIGHT_B, r"takes 1\d\d\.\d\d GB.*lower decode\.kv_cache_gb"),
        (
            {"num_blocks": 100},
            EIGHT_B,
            r"100 blocks of 64 tokens cannot hold .*enlarge decode\.num_blocks .*max_model_len to 6400",
        ),
    ],
)
def test_what_does_not_fit_says_the_value_and_the_limit(settings, memory, message, measured):
    measured(memory)
    with pytest.raises(ConfigError, match=message):
        plan_kv_cache(on_gpu(**settings), [SPEC], 8192)


def test_batches_that_do_not_fit_say_which(monkeypatch):
    def out_of_memory(device, run):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("workers.kv_cache.sizing.measure_gpu_memory", out_of_memory)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GB, 24 * GB))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 16 * GB)
    with pytest.raises(
        ConfigError, match=r"largest batch \(2048 tokens of prefill, 256 .*16\.00 GB of weights.*24\.00"
    ):
        plan_kv_cache(on_gpu("prefill"), [SPEC], 8192)


def test_on_a_cpu_the_size_is_configured_or_bounded_by_the_batch(caplog):
    spec = ROW_SPEC
    config = WorkerConfig("decode-0", "decode", "m", max_num_seqs=3)
    with caplog.at_level(logging.INFO, "workers.kv_cache.sizing"):
        assert allocate_kv_caches(config, [spec], 256)[0].shape[1] == 3 * 16
    assert "decode-0: KV cache" in caplog.text
    assert "48 blocks, 768 tokens" in caplog.text
    sized = dataclasses.replace(config, kv_cache_bytes=20 * spec.bytes_per_block + 1)
    assert allocate_kv_caches(sized, [spec], 256)[0].shape[1] == 20


@pytest.mark.parametrize(("budget", "seqs", "longest"), [(2048, 16, 512), (100, 16, 4), (7, 16, 512), (33, 2, 512)])
def test_the_largest_prefill_fills_the_budget(budget, seqs, longest):
    config = WorkerConfig("p", "prefill", "m", max_num_batched_tokens=budget, max_num_seqs=seqs)
    rows = prefill_rows(config, longest, [ROW_SPEC])
    assert sum(len(row.token_ids) for row in rows) == min(budget, seqs * longest)
    assert len(rows) == min(seqs, budget)
    assert all(1 <= len(row.token_ids) <= longest for row in rows)
    assert all(len(row.block_tables[0]) * 16 >= len(row.token_ids) for row in rows)


def test_the_largest_decode_has_every_sequence():
    rows = decode_rows(WorkerConfig("d", "decode", "m", max_num_seqs=9), 100, [ROW_SPEC])
    assert len(rows) == 9
    assert {(len(row.token_ids), row.start, len(row.block_tables[0])) for row in rows} == {(1, 99, 7)}


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_the_largest_batches_run(role, kv_cache_dtype, tiny_checkpoint):
    model = load_model(tiny_checkpoint("llama"), dtype="float32", kv_cache_dtype=kv_cache_dtype)
    batches: list[int] = []
    hook = model.norm.register_forward_hook(lambda module, inputs, output: batches.append(output.shape[0]))
    config = WorkerConfig(f"{role}-0", role, "m", max_num_batched_tokens=64, max_num_seqs=5)
    largest_batches_of(model, config, 256)()
    hook.remove()
    assert batches == [64 if role == "prefill" else 5]


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_is_measured_and_the_cache_leaves_it_room(tiny_checkpoint):
    model = load_model(tiny_checkpoint("llama"), dtype="bfloat16", device="cuda", block_size=64)
    config = WorkerConfig("prefill-0", "prefill", "m", device="cuda", max_num_seqs=4, block_size=64)
    peak_before = measure_gpu_memory("cuda").peak
    memory = measure_gpu_memory("cuda", largest_batches_of(model, config, 2048))
    assert memory.peak > peak_before
    assert memory.allocated >= sum(parameter.nbytes for parameter in model.parameters())
    assert 0 < memory.own < memory.total
    (cache,) = allocate_kv_caches(config, model.kv_cache_groups, 2048, largest_batches_of(model, config, 2048))
    assert cache.shape[1] == 4 * 32
    with pytest.raises(ConfigError, match=r"lower prefill\.num_blocks"):
        allocate_kv_caches(dataclasses.replace(config, num_blocks=10**9), model.kv_cache_groups, 2048)


@pytest.mark.gpu
@needs_gpu
def test_a_large_batch_that_cannot_fit_is_refused_and_the_memory_is_back(tiny_checkpoint):
    config = WorkerConfig("prefill-0", "prefill", "m", device="cuda")
    spec = load_model(tiny_checkpoint("llama"), dtype="bfloat16", device="cuda").kv_cache_groups[0]

    def too_much() -> None:
        torch.empty(2 * torch.cuda.mem_get_info()[1], dtype=torch.uint8, device="cuda")

    with pytest.raises(ConfigError, match="largest batch"):
        plan_kv_cache(config, [spec], 2048, too_much)
    assert plan_kv_cache(config, [spec], 2048).num_blocks > 0


WINDOW = KVCacheSpec((1, 2, 3, 4, 5), 2, 16, 16, torch.float32, "sliding", 100)
WHOLE = KVCacheSpec((0,), 2, 16, 16, torch.float32)


def test_a_window_gets_what_a_full_batch_holds_and_the_rest_goes_to_what_keeps_everything():
    config = WorkerConfig("decode-0", "decode", "m", max_num_seqs=3, kv_cache_bytes=400 * WHOLE.bytes_per_block)
    plan = plan_kv_cache(config, [WHOLE, WINDOW], 2048)
    windows = 3 * 8 + 1  # 100 tokens, wherever they begin, and the block that stands for those given back
    assert plan.counts == (400 - 5 * windows, windows)
    assert (plan.num_blocks, plan.num_tokens) == (plan.counts[0], 16 * plan.counts[0])
    assert plan.kv_bytes == sum(n * spec.bytes_per_block for n, spec in zip(plan.counts, (WHOLE, WINDOW), strict=True))
    assert "blocks of all cache groups: 275, 25" in str(plan)
    caches = allocate_kv_caches(config, [WHOLE, WINDOW], 2048)
    assert [cache.shape[:2] for cache in caches] == [(1, 275), (5, 25)]
    assert sum(cache.nbytes for cache in caches) == plan.kv_bytes


def test_a_window_needs_no_more_blocks_than_what_keeps_everything():
    config = WorkerConfig("decode-0", "decode", "m", max_num_seqs=30, num_blocks=40)
    assert plan_kv_cache(config, [WHOLE, WINDOW], 512).counts == (40, 41)


@pytest.mark.parametrize("num_bytes", [0, 1, 5000, 10**6, 10**7])
def test_the_split_takes_all_that_fits_and_no_more(num_bytes):
    split = CacheSplit([WHOLE, WINDOW], [128, 8], 4)
    count = split.blocks_that_fit(num_bytes)
    assert count == 0 or split.num_bytes(count) <= num_bytes
    assert split.num_bytes(count + 1) > num_bytes


def test_a_model_of_windows_alone_needs_no_room_for_its_longest_sequence():
    config = WorkerConfig("prefill-0", "prefill", "m", max_num_seqs=4, num_blocks=20, max_num_batched_tokens=64)
    assert plan_kv_cache(config, [WINDOW], 100_000).counts == (21,)
    with pytest.raises(ConfigError, match=r"10 blocks of 16 tokens cannot hold one sequence .* \(12 blocks\)"):
        plan_kv_cache(dataclasses.replace(config, num_blocks=10), [WINDOW], 100_000)
    free = dataclasses.replace(config, num_blocks=None)
    assert plan_kv_cache(free, [WINDOW], 100_000).num_blocks == 4 * 12, "a window and a chunk, for a full batch"


def test_the_layout_says_what_each_group_keeps():
    layout = kv_layout([WHOLE, WINDOW], 2)
    assert [(g.kind, g.layers, g.window) for g in layout.groups] == [
        ("full", (0,), None),
        ("sliding", (1, 2, 3, 4, 5), 100),
    ]
    assert [group.block_bytes * group.num_layers for group in layout.groups] == [
        WHOLE.bytes_per_block, WINDOW.bytes_per_block
    ]  # fmt: skip

"""What stops a launch before anything has started, or in the middle of it."""

from __future__ import annotations

import shutil
import socket

import pytest

from cluster.config.load import load_config
from cluster.launch import launch
from made_requests import engine_request
from workers.errors import CheckpointError, ConfigError
from workers.sampling_params import SamplingParams


async def start(**overrides) -> None:
    settings = {key.replace("__", "."): value for key, value in overrides.items()}
    async with launch(load_config(environ={}, overrides=settings), lambda line: None):
        pytest.fail("it started")


async def test_a_ray_address_where_nobody_listens(tiny_checkpoint):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"cannot reach Ray at {address}: .*refused"):
            await start(model__path=str(tiny_checkpoint("llama")), ray__address=address)


async def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="nothing-here"):
        await start(model__path=str(tmp_path / "nothing-here"))


async def test_unlike_block_sizes_are_refused_with_both(tiny_checkpoint):
    with pytest.raises(ConfigError, match=r"block_size is (16 here and 32|32 here and 16) there"):
        await start(
            model__path=str(tiny_checkpoint("llama")),
            handoff__connector="local",
            decode__block_size=32,
            prefill__num_blocks=256,
            decode__num_blocks=256,
        )


async def test_a_cache_too_small_for_one_sequence_says_what_to_change(tiny_checkpoint):
    with pytest.raises(
        ConfigError, match=r"8 blocks of 16 tokens cannot hold .* max_model_len 2048 \(128 blocks\).*to 128$"
    ):
        await start(
            model__path=str(tiny_checkpoint("llama")),
            handoff__connector="local",
            decode__num_blocks=8,
            model__max_model_len=2048,
        )


async def test_a_context_window_that_nobody_asked_for_becomes_what_fits(tiny_checkpoint):
    overrides = {
        "model.path": str(tiny_checkpoint("llama")),
        "handoff.connector": "local",
        "prefill.num_blocks": 32,
        "decode.num_blocks": 8,
    }
    lines: list[str] = []
    async with launch(load_config(environ={}, overrides=overrides), lines.append) as service:
        assert service.model_info.max_model_len == 8 * 16
    assert any(line.startswith("the context window is 128 tokens") and "not the model's 2048" in line for line in lines)


async def test_what_looking_at_the_files_can_show_is_shown_before_ray_starts(tiny_checkpoint, tmp_path, monkeypatch):
    def must_not_start(*_args, **_settings):
        raise AssertionError("Ray was started")

    monkeypatch.setattr("ray.init", must_not_start)
    whole = tiny_checkpoint("llama")
    with pytest.raises(ConfigError, match=r"decode\.attention_backend: unknown .* did you mean CPU_ATTN"):
        await start(model__path=str(whole), decode__attention_backend="CPU_ATN")
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    (broken / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        await start(model__path=str(broken))


@pytest.mark.parametrize(("given", "told"), [(None, {"worker_niceness": 0}), ("5", None)])
async def test_workers_do_not_stand_back_behind_other_programs(tiny_checkpoint, monkeypatch, given, told):
    monkeypatch.delenv("RAY_worker_niceness", raising=False)
    if given is not None:
        monkeypatch.setenv("RAY_worker_niceness", given)
    asked = []

    def note(**settings):
        asked.append(settings["_system_config"])
        raise RuntimeError("enough is known")

    monkeypatch.setattr("ray.init", note)
    with pytest.raises(ConfigError, match="enough is known"):
        await start(model__path=str(tiny_checkpoint("llama")))
    assert asked == [told]


async def test_gpus_that_were_asked_for_and_are_not_there(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="this machine has none"):
        await start(model__path=str(tiny_checkpoint("llama")), handoff__connector="local", prefill__num_gpus=1)


async def test_an_attention_backend_that_does_not_exist(tiny_checkpoint):
    with pytest.raises(ConfigError, match="CPU_ATTN"):
        await start(
            model__path=str(tiny_checkpoint("llama")), handoff__connector="local", prefill__attention_backend="CPU_ATN"
        )


async def test_a_whole_service_in_one_process(tiny_checkpoint, reference_greedy):
    checkpoint = tiny_checkpoint("qwen3")
    overrides = {"model.path": str(checkpoint), "handoff.connector": "local", "model.max_model_len": 256}
    lines: list[str] = []
    async with launch(load_config(environ={}, overrides=overrides), lines.append) as service:
        assert service.model_info.max_model_len == 256
        assert service.model_info.architecture == "qwen3"
        prompt = tuple(range(3, 90))
        sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=9, ignore_eos=True)
        stream = service.engine.generate(engine_request("r", prompt, sampling, 30.0))
        tokens = [token.token_id async for chunk in stream for token in chunk.tokens]
    assert tokens == reference_greedy(checkpoint, list(prompt), 9)
    assert any("into 1 prefill workers on cpu and 1 decode workers on cpu, 0." in line for line in lines)
    # Full batches of 256 tokens; a token has keys and values of 2 heads of 32 floats in each of 3 layers.
    assert any("256 KV blocks of 16 tokens (4096 tokens, 6.3 MB)" in line for line in lines)


async def test_a_pool_of_groups_says_what_each_is(tiny_checkpoint, reference_greedy):
    checkpoint = tiny_checkpoint("llama")
    overrides = {
        "model.path": str(checkpoint),
        "handoff.connector": "local",
        "prefill.num_blocks": "128",
        "decode.groups": {"small": {"num_blocks": 256}, "more": {"replicas": 0}, "large": {"kv_cache_gb": 0.01}},
    }
    lines: list[str] = []
    async with launch(load_config(environ={}, overrides=overrides), lines.append) as service:
        sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=5, ignore_eos=True)
        stream = service.engine.generate(engine_request("r", tuple(range(3, 40)), sampling, 30.0))
        tokens = [token.token_id async for chunk in stream for token in chunk.tokens]
        targets = [(target.key, target.target) for target in service.engine.scale({})]
        names = [worker.engine_id.partition(".")[0] for worker in service.engine.workers()]
    assert tokens == reference_greedy(checkpoint, list(range(3, 40)), 5)
    assert targets == [("prefill", 1), ("decode.small", 1), ("decode.more", 0), ("decode.large", 1)]
    assert names == ["prefill-0", "decode-small-0", "decode-large-0"]
    assert any("1 prefill workers on cpu, 1 decode-small workers on cpu and 1 decode-large" in line for line in lines)
    assert any(line.startswith("decode-small-0 on cpu") and "256 KV blocks" in line for line in lines)


async def test_without_prefill_workers_every_prompt_is_computed_where_it_is_decoded(tiny_checkpoint, reference_greedy):
    checkpoint = tiny_checkpoint("llama")
    overrides = {
        "model.path": str(checkpoint),
        "handoff.connector": "local",
        "prefill.replicas": "0",
        "router.disaggregation": "never",
    }
    lines: list[str] = []
    async with launch(load_config(environ={}, overrides=overrides), lines.append) as service:
        sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=9, ignore_eos=True)
        stream = service.engine.generate(engine_request("r", tuple(range(3, 90)), sampling, 30.0))
        tokens = [token.token_id async for chunk in stream for token in chunk.tokens]
        report = await stream.report()
    assert tokens == reference_greedy(checkpoint, list(range(3, 90)), 9)
    assert (report.prefill_worker, report.decode_worker.partition(".")[0]) == ("", "decode-0")
    assert "there are no prefill workers: every prompt is computed on its decode worker" in lines

"""The engine at fixed points: what is counted as a step, what the limits are made of, and a run on a tiny shape."""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import gpu_engine
from benchmarks.engine_points import Plan, Point, full_steps, measure_decode, measure_prefill
from benchmarks.llama_8b import SHAPE, save_shape
from benchmarks.model_shapes import GPT_OSS_20B, QWEN3_30B_A3B, SHAPES, model_folder
from benchmarks.model_work import Work
from workers.models.loader import weight_map
from workers.models.registry import parse_model

TINY = {
    **SHAPE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def test_the_work_of_the_shape_is_that_of_llama_3_1_8b() -> None:
    work = Work.of(SHAPE)
    embedding = SHAPE["vocab_size"] * SHAPE["hidden_size"]
    norms = (2 * 32 + 1) * 4096
    assert work.layer_parameters + work.head_parameters + embedding + norms == 8_030_261_248
    assert work.kv_bytes_per_token == 128 * 1024
    assert work.decode_bytes(64, 4064) == 2 * (8_030_261_248 - embedding - norms) + 64 * 4064 * 131072
    assert work.prefill_flops(2, 100) == 2 * work.prefill_flops(1, 100)
    longer = work.prefill_flops(1, 2000) - 2 * work.prefill_flops(1, 1000)
    assert longer == 1000 * 1000 * work.attention_flops_per_pair - 2 * work.head_parameters


@pytest.mark.parametrize(("name", "total"), [("qwen3-30b-a3b", 30_532_122_624), ("gpt-oss-20b", 20_914_757_184)])
def test_shapes_with_experts_are_those_of_the_models(name: str, total: int) -> None:
    model_class, config = parse_model(SHAPES[name])
    assert weight_map(model_class, config).num_elements == total
    work = Work.of(SHAPES[name])
    embedding = config.vocab_size * config.hidden_size
    in_matrices = work.layer_parameters + (work.num_experts - work.top_k) * work.expert_parameters
    assert in_matrices + work.head_parameters + embedding == pytest.approx(total, rel=1e-3)  # norms and biases are left


def test_a_step_reads_the_experts_that_its_tokens_go_to() -> None:
    work = Work.of(QWEN3_30B_A3B)
    assert work.decode_bytes(1, 0) == 2 * (work.layer_parameters + work.head_parameters)
    assert work.experts_of(1) == pytest.approx(8)
    assert work.experts_of(2) == pytest.approx(8 + 8 * 120 / 128)
    assert work.experts_of(1000) == pytest.approx(128)
    everything = work.layer_parameters + work.head_parameters + 120 * work.expert_parameters
    assert work.decode_bytes(1000, 0) == pytest.approx(2 * everything)


def test_a_window_bounds_what_is_read_and_computed() -> None:
    work = Work.of(GPT_OSS_20B)
    assert (work.window, work.windowed, work.kv_bytes_per_token) == (128, 0.5, 48 * 1024)
    grown = work.decode_bytes(4, 1000) - work.decode_bytes(4, 200)
    assert grown == pytest.approx(4 * 800 * work.kv_bytes_per_token / 2)
    pairs = sum(i + min(i, 128) for i in range(1, 301)) / 2
    matrices = 2 * work.layer_parameters * 300 + 2 * work.head_parameters
    assert work.prefill_flops(1, 300) == pytest.approx(matrices + pairs * work.attention_flops_per_pair)


def test_a_model_is_a_folder_or_a_name(tmp_path: Path) -> None:
    assert model_folder(tmp_path / "mine", tmp_path) == tmp_path / "mine"
    (tmp_path / "gpt-oss-20b").mkdir()
    (tmp_path / "gpt-oss-20b" / "config.json").write_text("{}")  # so that no tokenizer is made
    assert model_folder(Path("gpt-oss-20b"), tmp_path) == tmp_path / "gpt-oss-20b"


def test_only_steps_with_a_token_for_everybody_are_timed() -> None:
    arrivals = [(0.0, 1), (1.0, 2), (2.0, 3), (3.0, 3), (5.0, 0), (6.0, 3), (7.0, 3), (8.0, 2)]
    found, generated = full_steps(arrivals, batch=3, warmup=1, steps=2)
    assert found == [3.0, 1.0]  # the step that brought nothing made the next tokens late
    assert generated == (1 + 2 + 3 + 3) / 3 + 1
    with pytest.raises(ValueError, match="whole for 4 steps, 6 are needed"):
        full_steps(arrivals, batch=3, warmup=1, steps=4)
    with pytest.raises(ValueError, match="whole"):  # one fell out of the batch in between
        full_steps([(0.0, 2), (1.0, 2), (2.0, 1), (3.0, 2), (4.0, 2)], batch=2, warmup=0, steps=3)


def test_a_limit_is_the_longer_of_reading_and_computing() -> None:
    work = Work(layer_parameters=10**9, head_parameters=0, attention_flops_per_pair=10**3, kv_bytes_per_token=10**5)
    limits = {"copy_bytes_per_s": 4e12, "matrix_flops_per_s": 8e14}
    reading = gpu_engine.decode_limit({"point": "1x1000", "context": 1000.0, "mean": 0.002}, limits, work)
    assert reading == pytest.approx({"limit_s": 2.1e9 / 4e12, "of_limit": 2.1e9 / 4e12 / 0.002})
    computing = gpu_engine.decode_limit({"point": "1000x1", "context": 1.0, "mean": 0.01}, limits, work)
    assert computing["limit_s"] == pytest.approx(1000 * (2e9 + 1e3) / 8e14)
    prefill = gpu_engine.prefill_limit({"point": "2x1000", "tokens_per_s": 2e5}, limits, work)
    assert prefill["limit_s"] == pytest.approx(2 * (2e12 + 1000 * 1001 / 2 * 1e3) / 8e14)
    assert prefill["of_limit"] == pytest.approx(prefill["limit_s"] / 0.01)


class _Scripted:
    """Takes a prompt's budget a step, then one token each a step, 1 ms a step."""

    def __init__(self) -> None:
        self._left: dict[str, int] = {}
        self.prompts: list[int] = []

    def add(self, request_id: str, prompt: Sequence[int], max_tokens: int, sampled: bool) -> None:
        assert request_id not in self._left
        assert all(0 <= token < 50 for token in prompt)
        self._left[request_id] = max_tokens
        self.prompts.append(len(prompt))

    def step(self) -> int:
        time.sleep(0.001)
        count = len(self._left)
        self._left = {name: left - 1 for name, left in self._left.items() if left > 1}
        return count

    @property
    def busy(self) -> bool:
        return bool(self._left)


def test_points_are_measured_by_stepping_an_engine() -> None:
    plan = Plan(repeats=2, decode_repeats=2, steps=10, warmup=3, max_num_batched_tokens=100, vocab_size=50)
    engine = _Scripted()
    prefill = measure_prefill(engine, Point(4, 7), plan)
    assert engine.prompts == [7] * 4 * 3
    assert len(prefill.seconds) == 2
    assert 0 < prefill.tokens_per_s < 4 * 7 / 0.001
    engine.prompts.clear()
    decode = measure_decode(engine, Point(2, 40), plan)
    assert engine.prompts == [40 - 3 - 5] * 2 * 3
    assert decode.steps == 20
    assert decode.context == 32 + 4 + 5  # a token comes with the prompt, three steps are left out
    assert decode.mean >= 0.001
    assert decode.p99 >= decode.p50


@pytest.mark.parametrize("text", ["64", "x64", "64x", "0x5", "5x0", "-1x5", "axb"])
def test_a_point_is_two_positive_numbers(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="BATCHxTOKENS"):
        Point.parse(text)


def test_the_benchmark_runs_end_to_end(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    code = gpu_engine.main(
        [
            "--device", "cpu", "--dtype", "float32", "--model", str(save_shape(tmp_path / "tiny", TINY)),
            "--prefill", "1x32", "4x32", "--decode", "1x24", "4x24", "--sampled", "4x24", "--repeats", "2",
            "--decode-repeats", "2", "--steps", "10", "--warmup", "2", "--max-num-batched-tokens", "64",
            "--output", str(output), "--run", "test",
        ]
    )  # fmt: skip
    assert code == 0
    result = json.loads(output.read_text())
    assert result["kind"] == "gpu_engine"
    assert result["config"]["run"] == "test"
    assert [row["point"] for row in result["prefill"]] == ["1x32", "4x32"]
    assert [(row["point"], row["sampled"]) for row in result["decode"]] == [
        ("1x24", False), ("4x24", False), ("4x24", True),
    ]  # fmt: skip
    for row in result["decode"]:
        assert (row["steps"], row["context"]) == (20, 17 + 3 + 5)
    for row in (*result["prefill"], *result["decode"]):
        assert 0 < row["of_limit"] < 1
    assert set(result["start_up"]["decode"]) == {"load", "profile", "capture"}
    assert result["workers"]["prefill"]["block_size"] == 16


def test_a_shape_that_is_not_there_ends_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "architectures": ["Unheard"], "model_type": "unheard"}))
    code = gpu_engine.main(["--device", "cpu", "--model", str(tmp_path), "--output", str(tmp_path / "x.json")])
    assert code == 1
    assert "gpu_engine: " in capsys.readouterr().err

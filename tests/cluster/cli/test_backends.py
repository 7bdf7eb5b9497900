"""`baton backends`: the table, the choice, measuring, and mistakes as one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from attention.selection.measurements import load_records
from attention.selection.registry import BACKENDS
from attention.spec import Phase
from cluster.cli.main import main
from cluster.config.load import cache_dir

TinyCheckpoint = Callable[..., Path]
Baton = Callable[..., tuple[int, str, str]]


@pytest.fixture
def baton(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run `baton backends` with an empty cache of its own: exit code, output, errors."""
    monkeypatch.setenv("BATON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("BATON_ATTENTION_BACKEND", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["backends", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def row(out: str, name: str) -> list[str]:
    return next(line.split() for line in out.splitlines() if line.startswith(f"{name} "))


def test_this_machine_and_a_shape_that_it_names(baton: Baton) -> None:
    code, out, err = baton("--device", "cpu")
    assert (code, err) == (0, "")
    assert out.startswith("CPU\nthe shape of Llama 3.1 8B (--model takes another): 32 query and 8 KV heads of 128, bf")
    assert "prefill CPU_ATTN (first by priority)" in out
    assert "decode  CPU_ATTN (first by priority)" in out
    assert row(out, "CPU_ATTN") == ["CPU_ATTN", "chosen", "chosen", "ran"]
    assert row(out, "TORCH_SDPA")[1:3] == ["yes", "yes"]
    assert row(out, "FLASHMLA")[1:4] == ["no", "no", "-"]
    assert all(f"\n{name} " in out for name in BACKENDS)


def test_phases_are_chosen_apart(baton: Baton) -> None:
    code, out, _ = baton("--simulate", "sm90")
    assert code == 0
    assert out.startswith("H100/H200 (SM 9.0), simulated\n")
    assert row(out, "FLASH_ATTN")[1:3] == ["chosen", "yes"]
    assert row(out, "TRITON_ATTN")[1:3] == ["yes", "chosen"]
    assert "runs on cpu" in out


@pytest.mark.parametrize("platform", ["sm75", "sm80", "sm89", "sm100", "rocm", "tpu", "xpu", "cpu"])
def test_every_platform_can_be_simulated_anywhere(baton: Baton, platform: str) -> None:
    code, out, err = baton("--simulate", platform, "--dtype", "float16" if platform == "sm75" else "bfloat16")
    assert (code, err) == (0, "")
    assert "none" not in out.splitlines()[2:4]


def test_explain_gives_every_reason(baton: Baton) -> None:
    first = baton("--simulate", "cpu", "--kv-cache-dtype", "fp8")[1]
    every = baton("--simulate", "cpu", "--kv-cache-dtype", "fp8", "--explain")[1]
    assert "FP8 KV cache" in first
    assert "(+" in first
    assert "(+" not in every
    assert "not made for MLA layers" not in first
    assert "made for MLA layers only" in every
    assert len(every.splitlines()) > len(first.splitlines())


def test_a_model(baton: Baton, tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("mistral")
    code, out, _ = baton("--model", str(folder), "--block-size", "32", "--simulate", "cpu")
    assert code == 0
    assert "4 query and 2 KV heads of 16" in out
    assert "blocks of 32" in out
    assert "window of 24 tokens" in out


def test_json(baton: Baton) -> None:
    code, out, _ = baton("--simulate", "sm100", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["platform"] == {"name": "B200 (SM 10.0)", "kind": "cuda", "simulated": True}
    assert report["model"]["head_size"] == 128
    assert report["chosen"]["decode"] == {"backend": "FLASHINFER", "because": "first by priority"}
    by_name = {backend["name"]: backend for backend in report["backends"]}
    assert set(by_name) == set(BACKENDS)
    assert by_name["FLASHINFER"]["refusals"] == {"prefill": [], "decode": []}
    assert by_name["CPU_ATTN"]["refusals"]["decode"] == ["runs on cpu, not on cuda"]
    assert by_name["CPU_ATTN"]["evidence"] is None


def test_nothing_usable_is_said_and_fails(baton: Baton) -> None:
    code, out, _ = baton("--simulate", "sm75", "--dtype", "bfloat16")
    assert code == 1
    assert "prefill none (all refuse)" in out
    assert "bfloat16 needs SM 8.0 or newer, this is SM 7.5" in out


def test_a_gpu_without_bfloat16_runs_in_float16_if_nothing_else_is_said(
    baton: Baton, tiny_checkpoint: TinyCheckpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = json.loads((tiny_checkpoint("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    for shape in ((), ("--model", str(tmp_path))):
        code, out, _ = baton("--simulate", "sm75", *shape)
        assert code == 0
        assert "float16" in out
        assert "prefill TRITON_ATTN (first by priority)" in out
        assert "bfloat16 needs SM 8.0 or newer, this is SM 7.5: running it in float16" in caplog.text


def test_each_kind_of_layer_is_chosen_for_as_workers_do(baton: Baton, tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 96, "vocab_size": 512, "max_position_embeddings": 2048}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2}
    windows = {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 1}
    config = {"architectures": ["Qwen2ForCausalLM"], "dtype": "bfloat16", **sizes, **heads, **windows}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, _ = baton("--model", str(tmp_path), "--simulate", "sm90")
    assert code == 0
    assert "prefill FLASH_ATTN; FLASHINFER (first by priority)" in out
    assert "decode  TRITON_ATTN (first by priority)" in out
    _, out, _ = baton("--model", str(tmp_path), "--simulate", "sm90", "--json")
    assert json.loads(out)["chosen"]["prefill"]["backend"] == "FLASH_ATTN; FLASHINFER"


def test_evidence_is_of_the_simulated_architecture(baton: Baton) -> None:
    found = {}
    for name in ("sm80", "sm90"):
        _, out, _ = baton("--simulate", name, "--json")
        found[name] = {row["name"]: row["evidence"] for row in json.loads(out)["backends"]}
    assert found["sm90"]["TRITON_ATTN"] == "ran on this architecture"
    assert found["sm80"]["TRITON_ATTN"] == "adapter to the real library; never run on this architecture"
    assert "ran on this architecture" not in found["sm80"].values()


def test_the_configured_backend(baton: Baton, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_ATTENTION_BACKEND", "TORCH_SDPA")
    monkeypatch.setenv("BATON_DECODE__ATTENTION_BACKEND", "CPU_ATTN")
    code, out, _ = baton("--device", "cpu")
    assert code == 0
    assert "prefill TORCH_SDPA (configured)" in out
    assert "decode  CPU_ATTN (configured)" in out


def test_a_configured_backend_that_refuses_says_why(baton: Baton, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_ATTENTION_BACKEND", "FLASHINFER")
    code, out, _ = baton("--device", "cpu")
    assert code == 1
    assert "none (attention backend FLASHINFER cannot run this model: runs on cuda, not on cpu" in out


def test_measuring_keeps_what_the_choice_then_uses(
    baton: Baton, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attention.selection.measure.candidates", lambda *_: ("CPU_ATTN", "TORCH_SDPA"))
    monkeypatch.setattr("attention.selection.measure.ENOUGH_S", 0.0)
    model = ("--model", str(tiny_checkpoint("mistral")), "--device", "cpu")
    code, out, err = baton(*model, "--measure")
    path = cache_dir() / "attention.json"
    assert code == 0
    assert "measuring on CPU, window of 24 tokens" in err
    assert f"kept in {path}" in err
    assert out.count("(measured fastest)") == 2
    (record,) = load_records(path)
    assert {m.phase for m in record.measurements} == set(Phase)
    again = json.loads(baton(*model, "--json")[1])
    assert {choice["because"] for choice in again["chosen"].values()} == {"measured fastest"}
    other = json.loads(baton(*model, "--json", "--block-size", "32")[1])
    assert {choice["because"] for choice in other["chosen"].values()} == {"first by priority"}


def test_a_measurement_that_cannot_be_kept_is_one_line(
    baton: Baton, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("in the way")
    monkeypatch.setattr("attention.selection.measure.candidates", lambda *_: ())
    code, out, err = baton("--model", str(tiny_checkpoint("llama")), "--device", "cpu", "--measure")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith(f"baton backends: cannot write {tmp_path / 'cache'}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--simulate", "h200"), "no simulated platform 'h200': one of sm75, sm80"),
        (("--simulate", "sm90", "--measure"), "--measure is about a device of this machine"),
        (("--simulate", "sm90", "--device", "cpu"), "--device is about a device of this machine"),
        (("--device", "tpu"), "--device is 'tpu', it must be cpu or cuda"),
        (("--dtype", "fp16"), "dtype 'fp16' is none of auto, float32, bfloat16, float16"),
        (("--block-size", "0"), "--block-size is 0, it must be at least 1"),
        (("--model", "/no/such/folder"), "/no/such/folder"),
    ],
)
def test_a_mistake_is_one_line(baton: Baton, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = baton(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith("baton backends: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_one_line(baton: Baton) -> None:
    code, _, err = baton("--device", "cuda")
    assert (code, err) == (1, "baton backends: --device is cuda, and PyTorch sees no such device here\n")


def test_a_wrong_backend_name_is_one_line(baton: Baton, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_ATTENTION_BACKEND", "FLASHINFR")
    code, out, err = baton("--simulate", "sm90")
    assert (code, out) == (1, "")
    assert err.startswith("baton backends: unknown attention backend 'FLASHINFR': one of CPU_ATTN")
    assert err.endswith("did you mean FLASHINFER?\n")


def test_a_wrong_choice_of_a_flag_is_a_usage_error(baton: Baton) -> None:
    with pytest.raises(SystemExit) as caught:
        baton("--kv-cache-dtype", "int3")
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"BATON_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/baton"),
        ({}, "~/.cache/baton"),
    ],
)
def test_where_caches_are_kept(environ: dict[str, str], folder: str) -> None:
    assert cache_dir(environ) == Path(folder).expanduser()

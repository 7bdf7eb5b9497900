"""What the flags of `baton up` set."""

from __future__ import annotations

import argparse
from dataclasses import fields

import pytest

from cluster.cli.foreign_flags import FLAGS, SETTINGS
from cluster.cli.main import main
from cluster.cli.up import add_arguments, overrides_of
from cluster.config.load import load_config
from cluster.config.schema import ServiceConfig
from workers.errors import ConfigError


def up_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser


def configured(*arguments: str) -> ServiceConfig:
    return load_config(environ={}, overrides=overrides_of(up_parser().parse_args(arguments)))


def test_without_flags_everything_is_as_by_default() -> None:
    assert configured() == load_config(environ={})


def test_flags_of_the_engine_hold_for_both_pools() -> None:
    config = configured(
        "--load-format", "dummy", "--kv-cache-dtype", "fp8", "--gpu-memory-utilization", "0.45", "--enforce-eager"
    )
    assert config.model.load_format == "dummy"
    for pool in (config.prefill, config.decode):
        assert (pool.kv_cache_dtype, pool.gpu_memory_utilization, pool.enforce_eager) == ("fp8", 0.45, True)


def test_each_door_has_a_port() -> None:
    server = configured("--port", "50052", "--http-port", "8001").server
    assert (server.port, server.http.port) == (50052, 8001)
    assert configured("--port", "0").server.http.port == 0, "a free one for both"
    assert configured().server.http.port == 8000


def test_ranks_hold_for_both_pools() -> None:
    config = configured("--tensor-parallel-size", "2")
    assert (config.prefill.tensor_parallel_size, config.decode.tensor_parallel_size) == (2, 2)


def test_set_beats_a_flag() -> None:
    config = configured("--gpu-memory-utilization", "0.45", "--set", "decode.gpu_memory_utilization=0.3")
    assert (config.prefill.gpu_memory_utilization, config.decode.gpu_memory_utilization) == (0.45, 0.3)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("--max-model-len", "4096"), "--max-model-len: say --set model.max_model_len=4096"),
        (("--max-model-len=4096",), "--set model.max_model_len=4096"),
        (("--served-model-name", "x"), "--set model.served_name=x"),
        (("-tp", "2"), "say --tensor-parallel-size 2"),
        (("--mem-fraction-static", "0.8"), "say --gpu-memory-utilization 0.8"),
        (("--trust-remote-code",), "no code from a checkpoint"),
        (("--frobnicate", "2"), "--help lists what there is"),
        (("--load-fromat", "dummy"), "did you mean --load-format?"),
    ],
)
def test_flags_of_other_servers_get_a_hint(
    arguments: tuple[str, ...], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("up", "serve"):
        with pytest.raises(SystemExit) as caught:
            main([command, *arguments])
        assert caught.value.code == 2
        assert hint in capsys.readouterr().err


def test_settings_that_hints_name_exist() -> None:
    for settings in SETTINGS.values():
        for setting in settings:
            section, _, name = setting.partition(".")
            assert name in {field.name for field in fields(getattr(ServiceConfig(), section))}
    text = up_parser().format_help()
    assert all(f"{flag} " in text or f"{flag}\n" in text for flag in FLAGS.values())


def test_serve_is_up_with_a_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[str | None] = []
    monkeypatch.setattr("cluster.cli.up.run", lambda args: seen.append(args.model) or 0)
    assert main(["serve", "meta/llama", "--port", "7"]) == main(["serve", "--model", "x"]) == main(["serve"]) == 0
    assert seen == ["meta/llama", "x", None]
    assert main(["serve", "a", "--model", "b"]) == 1
    assert "the model is given twice: a and --model b" in capsys.readouterr().err


def test_a_wrong_value_names_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"prefill\.kv_cache_dtype is 'int4'"):
        configured("--kv-cache-dtype", "int4")

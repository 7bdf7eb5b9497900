"""Settings that would serve something else than what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config.load import load_config
from workers.errors import ConfigError


def refusal(environ: dict[str, str] | None = None, **overrides: object) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(environ=environ or {}, overrides={key.replace("__", "."): v for key, v in overrides.items()})
    return str(error.value)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("decod.max_num_seqs", "decode.max_num_seqs"),
        ("decod.max_num_sqs", "decode.max_num_seqs"),
        ("decod.x", "decode"),
        ("severs.port", "server.port"),
        ("model.port", "server.port"),
        ("server.prot", "server.port"),
    ],
)
def test_a_misspelt_section_is_recognised(key: str, meant: str) -> None:
    assert refusal(**{key: "1"}) == f"unknown configuration key {key}; did you mean {meant}?"


def test_an_empty_token_is_no_token_and_running_open_is_said_in_a_word() -> None:
    assert "BATON_SERVER__AUTH_TOKEN is empty" in refusal({"BATON_SERVER__AUTH_TOKEN": ""})
    assert "server.auth_token is empty" in refusal(server__auth_token=" ")
    assert "server.auth_token_file is empty" in refusal(server__auth_token_file="")
    assert load_config(environ={"BATON_SERVER__AUTH_TOKEN": "none"}).server.auth_token is None


@pytest.mark.parametrize("blank", ["", "null", "~", "''"])
def test_a_blank_token_in_a_file_is_no_token_either(tmp_path: Path, blank: str) -> None:
    path = tmp_path / "service.yaml"
    path.write_text(f"server:\n  auth_token: {blank}\n")
    with pytest.raises(ConfigError, match=r"server\.auth_token is empty"):
        load_config(path, environ={})
    path.write_text("server: {auth_token: none, auth_token_file: none}\n")
    assert load_config(path, environ={}).server.auth_token is None


def test_no_attention_is_served_to_those_who_ask_for_wrong_answers() -> None:
    assert "model.without_attention=true" in refusal(prefill__attention_backend="NO_ATTENTION")
    asked = {"decode.attention_backend": "NO_ATTENTION", "model.without_attention": "true"}
    assert load_config(environ={}, overrides=asked).decode.attention_backend == "NO_ATTENTION"


def test_gpus_for_workers_on_the_cpu_are_a_contradiction() -> None:
    assert (
        refusal(decode__device="cpu", decode__num_gpus=1) == "decode.num_gpus is 1 and decode.device is cpu; give one"
    )


def test_paths_in_a_file_are_relative_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "etc"
    (folder / "model").mkdir(parents=True)
    (folder / "token").write_text("secret")
    path = folder / "service.yaml"
    path.write_text(
        "model: {path: model}\nserver: {auth_token_file: token, tls_cert: ../cert.pem, tls_key: /abs/key.pem}\n"
    )
    monkeypatch.chdir(tmp_path)
    config = load_config(path, {})
    assert config.model.path == str(folder / "model")
    assert config.server.auth_token == "secret"
    assert config.server.tls_cert == str(folder / "../cert.pem")
    assert config.server.tls_key == "/abs/key.pem"
    path.write_text("model: {path: owner/name}\n")
    assert load_config(path, {}).model.path == "owner/name"
    path.write_text("model: {path: ./missing}\n")
    assert load_config(path, {}).model.path == str(folder / "missing")

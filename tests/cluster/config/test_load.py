from pathlib import Path

import pytest

from cluster.config.load import client_token, describe_settings, load_config, visible_gpus
from workers.errors import ConfigError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "service.yaml"
    path.write_text(text)
    return path


def test_defaults_bind_to_loopback_without_token_and_size_the_pools() -> None:
    config = load_config(environ={})
    assert (config.server.host, config.server.port) == ("127.0.0.1", 50051)
    assert config.server.auth_token is None
    assert (config.prefill.max_num_seqs, config.decode.max_num_seqs) == (16, 64)
    assert config.handoff.connector == "nixl"


def test_command_line_beats_environment_beats_file(tmp_path: Path) -> None:
    path = write(tmp_path, "server: {port: 1, host: 0.0.0.0}\nprefill: {block_size: 32, replicas: 2}\n")
    environ = {"BATON_SERVER__PORT": "2", "BATON_PREFILL__REPLICAS": "3", "PATH": "/bin"}
    config = load_config(path, environ, {"server.port": "3"})
    assert config.server.host == "0.0.0.0"
    assert config.server.port == 3
    assert (config.prefill.block_size, config.prefill.replicas) == (32, 3)
    assert config.decode.block_size is None


def test_attention_backend_variable_sets_both_pools_and_the_longer_name_beats_it() -> None:
    environ = {"BATON_ATTENTION_BACKEND": "TORCH_SDPA", "BATON_DECODE__ATTENTION_BACKEND": "REFERENCE"}
    config = load_config(environ=environ)
    assert (config.prefill.attention_backend, config.decode.attention_backend) == ("TORCH_SDPA", "REFERENCE")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("server.reflection", "off", False),
        ("prefill.num_cpus", "0.5", 0.5),
        ("prefill.num_cpus", "2", 2.0),
        ("decode.num_blocks", "128", 128),
        ("decode.num_blocks", "none", None),
        ("decode.block_size", "128", 128),
        ("decode.block_size", "none", None),
        ("prefill.gpu_memory_utilization", "0.45", 0.45),
        ("prefill.gpu_memory_utilization", "1", 1.0),
        ("prefill.kv_cache_dtype", "fp8", "fp8"),
        ("decode.enforce_eager", "true", True),
        ("prefill.enable_prefix_caching", "off", False),
        ("server.auth_token", "1234", "1234"),
        ("model.path", "org/name=with=equals", "org/name=with=equals"),
    ],
)
def test_a_text_becomes_a_value_of_the_keys_type(key: str, text: str, value: object) -> None:
    section, name = key.split(".")
    assert getattr(getattr(load_config(environ={}, overrides={key: text}), section), name) == value


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("server.prot", "server.port"),
        ("prefil.replicas", "prefill.replicas"),
        ("model.max_num_seqs", "prefill.max_num_seqs"),
        ("port", "port"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown configuration key {key}; did you mean \S*{nearest}\?"):
        load_config(environ={}, overrides={key: "1"})


def test_unknown_keys_in_file_and_environment_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"server\.prot; did you mean server\.port"):
        load_config(write(tmp_path, "server: {prot: 1}"), environ={})
    with pytest.raises(ConfigError, match=r"severs; did you mean server"):
        load_config(write(tmp_path, "severs: {port: 1}"), environ={})
    with pytest.raises(ConfigError, match=r"BATON_SERVER__PROT; did you mean BATON_SERVER__PORT"):
        load_config(environ={"BATON_SERVER__PROT": "1"})


def test_variables_that_kubernetes_sets_for_a_service_named_baton_are_not_ours() -> None:
    assert load_config(environ={"BATON_PORT": "tcp://10.0.0.1:50051", "BATON_SERVICE_HOST": "10.0.0.1"}) == load_config(
        environ={}
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("server: {port: '80'}", r"server\.port is '80', it must be a whole number"),
        ("server: {port: true}", r"server\.port is True, it must be a whole number"),
        (
            "server: {auth_token: 1234}",
            r"server\.auth_token is .* not shown, it must be a text or null \(put it in quotes\)",
        ),
        ("handoff: {timeout_s: soon}", r"handoff\.timeout_s is 'soon', it must be a number"),
        ("server: {reflection: 1}", r"server\.reflection is 1, it must be true or false"),
        ("prefill: {block_size: 1.5}", r"prefill\.block_size is 1\.5, it must be a whole number"),
        ("server: 5", r"section server .* must be a mapping"),
        ("[1, 2]", r"must be a mapping of sections .*, not \[1, 2\]"),
        ("server: {port: ", r"is not valid YAML"),
        ("model: {path: ''}", r"model\.path is empty"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text), environ={})


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("server.port", "65536", r"65536, it must be at least 0 and at most 65535"),
        ("prefill.replicas", "0", r"prefill\.replicas is 0, it must be at least 1"),
        ("server.default_timeout_s", "0", r"it must be .*more than 0"),
        ("server.default_timeout_s", "nan", r"server\.default_timeout_s is nan"),
        ("decode.kv_cache_gb", "inf", r"decode\.kv_cache_gb is inf"),
        ("prefill.gpu_memory_utilization", "0", r"prefill\.gpu_memory_utilization is 0\.0, it must be .*more than 0"),
        ("decode.gpu_memory_utilization", "90", r"decode\.gpu_memory_utilization is 90\.0, .*at most 1"),
        ("decode.kv_cache_dtype", "int8", r"'int8', it must be one of auto, fp8"),
        ("decode.block_size", "0", r"decode\.block_size is 0, it must be at least 1"),
        ("model.dtype", "int8", r"'int8', it must be one of auto, float32, bfloat16, float16"),
        ("decode.replicas", "65", r"decode\.replicas is 65, it must be in \[1, 64\], decode\.min_replicas and"),
        ("decode.min_replicas", "2", r"decode\.replicas is 1, it must be in \[2, 64\]"),
        ("prefill.drain_timeout_s", "-1", r"prefill\.drain_timeout_s is -1\.0, it must be at least 0"),
        ("server.port", "many", r"server\.port is 'many', it must be a whole number"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_limit(key: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(environ={}, overrides={key: text})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"server.tls_cert": "a.pem"}, r"server\.tls_key is not set"),
        ({"server.tls_client_ca": "a.pem"}, r"client certificates need TLS"),
        ({"server.auth_token": "a", "server.auth_token_file": "b"}, r"give one"),
        ({"decode.num_blocks": "1", "decode.kv_cache_gb": "1"}, r"decode\.num_blocks and decode\.kv_cache_gb"),
        (
            {"prefill.tensor_parallel_size": "2", "handoff.connector": "local"},
            r"prefill\.tensor_parallel_size is 2, it must be 1 with handoff\.connector local",
        ),
    ],
)
def test_keys_that_contradict_each_other_are_refused(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(environ={}, overrides=overrides)


def test_the_token_comes_from_its_file_and_stays_out_of_the_repr(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("s3cret\n")
    config = load_config(environ={}, overrides={"server.auth_token_file": str(path)})
    assert config.server.auth_token == "s3cret"
    assert "s3cret" not in repr(config)
    path.write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        load_config(environ={}, overrides={"server.auth_token_file": str(path)})
    with pytest.raises(ConfigError, match="No such file"):
        load_config(environ={}, overrides={"server.auth_token_file": str(tmp_path / "none")})


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        load_config(tmp_path / "none.yaml", environ={})
    assert load_config(write(tmp_path, ""), environ={}) == load_config(environ={})
    assert load_config(write(tmp_path, "server:\n"), environ={}) == load_config(environ={})


def test_the_client_token_comes_from_the_environment() -> None:
    assert client_token({"BATON_TOKEN": "abc"}) == "abc"
    assert client_token({"BATON_TOKEN": ""}) is None
    assert client_token({}) is None


@pytest.mark.parametrize(
    ("variable", "names"),
    [(None, ()), ("", ()), ("0", ("0",)), ("2, 3", ("2", "3")), ("GPU-8a,GPU-9b", ("GPU-8a", "GPU-9b"))],
)
def test_the_gpus_are_those_that_cuda_may_use(variable: str | None, names: tuple[str, ...]) -> None:
    assert visible_gpus({} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}) == names


def test_every_setting_is_described() -> None:
    text = describe_settings()
    assert "server.port" in text
    assert "decode.max_num_seqs              64" in text


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_worker_may_have_several_ranks(size: int) -> None:
    config = load_config(environ={}, overrides={"decode.tensor_parallel_size": str(size)})
    assert (config.prefill.tensor_parallel_size, config.decode.tensor_parallel_size) == (1, size)


@pytest.mark.parametrize("size", ["0", "3", "32"])
def test_a_number_of_ranks_that_divides_no_model_is_refused(size: str) -> None:
    with pytest.raises(ConfigError, match=rf"decode\.tensor_parallel_size is {size}, it must be one of 1, 2, 4, 8, 16"):
        load_config(environ={}, overrides={"decode.tensor_parallel_size": size})

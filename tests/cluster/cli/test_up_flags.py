"""What the flags of `baton up` set."""

from __future__ import annotations

import argparse

import pytest

from cluster.cli.up import add_arguments, overrides_of
from cluster.config.load import load_config
from cluster.config.schema import ServiceConfig
from workers.errors import ConfigError


def configured(*arguments: str) -> ServiceConfig:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return load_config(environ={}, overrides=overrides_of(parser.parse_args(arguments)))


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


def test_a_wrong_value_names_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"prefill\.kv_cache_dtype is 'int4'"):
        configured("--kv-cache-dtype", "int4")

"""What a pool may ask of nodes, how it is written, and what follows from it before any node is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config.load import load_config
from cluster.config.schema import ServiceConfig
from cluster.device_placement import place_groups
from cluster.ray.node_demands import awaited_nodes, check_cpus, gpus_in_sight
from workers.errors import ConfigError

ON_A_CLUSTER = {"ray.address": "auto"}


def configured(**settings: object) -> ServiceConfig:
    overrides = {**ON_A_CLUSTER, **{key.replace("__", "."): value for key, value in settings.items()}}
    return load_config(environ={}, overrides=overrides)


def test_resources_and_labels_in_a_file_in_the_environment_and_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "service.yaml"
    file.write_text(
        "ray: {address: auto}\nprefill: {resources: {prefill: 1, rack: 0.5}, labels: {baton/pool: prefill}}\n"
    )
    config = load_config(
        file,
        environ={"BATON_DECODE__RESOURCES": "decode=1"},
        overrides={"decode.labels": "baton/pool=decode, zone=a"},
    )
    assert config.prefill.resources == {"prefill": 1.0, "rack": 0.5}
    assert config.prefill.labels == {"baton/pool": "prefill"}
    assert config.decode.resources == {"decode": 1.0}
    assert config.decode.labels == {"baton/pool": "decode", "zone": "a"}
    assert configured().prefill.resources is None
    assert configured(prefill__resources="none").prefill.resources is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("prefill", "prefill.resources is 'prefill', it must be NAME=NUMBER pairs"),
        ("prefill=x", "prefill.resources is 'prefill=x', it must be"),
        ({"prefill": "1"}, "prefill.resources is {'prefill': '1'}, it must be NAME=NUMBER pairs"),
        ({"prefill": 0}, r"prefill.resources.prefill is 0.0, it must be more than 0"),
        ({1: 1.0}, "prefill.resources is {1: 1.0}, it must be NAME=NUMBER pairs"),
        (3, "prefill.resources is 3, it must be NAME=NUMBER pairs"),
        ({"GPU": 1.0}, "prefill.resources has GPU, which num_gpus says"),
        ({"CPU": 1.0}, "prefill.resources has CPU, which num_cpus says"),
    ],
)
def test_a_wrong_value_is_refused_by_name(value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(prefill__resources=value)


def test_nodes_of_a_kind_need_a_cluster() -> None:
    for key in ("resources", "labels"):
        with pytest.raises(ConfigError, match=f"decode.{key} is set, but Ray is started on this machine"):
            load_config(environ={}, overrides={f"decode.{key}": "decode=1"})


def test_pools_that_name_no_nodes_must_fit_at_once() -> None:
    with pytest.raises(ConfigError, match="the workers need 3 CPUs, the Ray cluster has 2"):
        check_cpus(configured(decode__replicas=2), {"CPU": 2.0})
    check_cpus(configured(decode__replicas=2), {"CPU": 3.0})


def test_pools_that_name_nodes_wait_for_them() -> None:
    config = configured(prefill__resources="prefill=1", decode__resources="decode=1", decode__replicas=2)
    check_cpus(config, {})
    assert awaited_nodes(config, {"prefill": 1.0, "decode": 1.0}) == [
        "the decode pool waits for nodes: it needs 2 decode, the Ray cluster has 1"
    ]
    assert awaited_nodes(configured(), {}) == []


def test_each_group_has_nodes_of_its_own() -> None:
    groups = {
        "h100": {"resources": {"h100": 1.0}, "device": "cuda", "replicas": 2},
        "cpu": {"device": "cpu", "labels": {"baton/pool": "cpu"}},
    }
    config = configured(decode__groups=groups, prefill__device="cpu")
    check_cpus(config, {"CPU": 1.0})
    assert awaited_nodes(config, {"h100": 1.0}) == [
        "the group h100 of the decode pool waits for nodes: it needs 2 h100, the Ray cluster has 1"
    ]
    assert gpus_in_sight(config, {}) == 2.0
    assert [place.device for place in place_groups(config, 2.0).values()] == ["cpu", "cuda", "cpu"]


def test_gpus_that_are_not_there_yet_count_for_pools_that_wait_for_them() -> None:
    waiting = {"prefill__resources": "prefill=1", "decode__labels": "baton/pool=decode"}
    cuda = {"prefill__device": "cuda", "decode__device": "cuda", "decode__replicas": 2}
    config = configured(**waiting, **cuda)
    assert gpus_in_sight(config, {}) == 3.0
    prefill, decode = place_groups(config, gpus_in_sight(config, {})).values()
    assert (prefill.device, prefill.num_gpus, decode.device, decode.num_gpus) == ("cuda", 1.0, "cuda", 1.0)
    assert gpus_in_sight(configured(**cuda), {"GPU": 1.0}) == 1.0, "nobody brings GPUs to pools that do not wait"
    assert gpus_in_sight(configured(**waiting), {"GPU": 1.0}) == 1.0, "auto takes what is there"

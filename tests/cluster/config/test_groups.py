"""Groups of unlike workers within a pool: where they may be written down, and what each of them is in the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config.groups import WorkerGroup, groups_of
from cluster.config.load import load_config
from cluster.config.schema import ServiceConfig
from workers.errors import ConfigError

UNLIKE = """
decode:
  block_size: 64
  max_num_seqs: 48
  num_blocks: 500
  groups:
    h100: {replicas: 2, device: cuda, min_replicas: 1, max_replicas: 4, resources: {h100: 1}}
    cpu: {device: cpu, kv_cache_gb: 1.5, block_size: 16, attention_backend: TORCH_SDPA}
ray: {address: auto}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "service.yaml"
    path.write_text(text)
    return path


def by_key(config: ServiceConfig) -> dict[str, WorkerGroup]:
    return {group.key: group for group in groups_of(config)}


def test_a_pool_without_groups_is_one_without_a_name() -> None:
    prefill, decode = groups_of(load_config(environ={}, overrides={"decode.replicas": "3"}))
    assert (prefill.key, prefill.section, prefill.label) == ("prefill", "prefill", "prefill")
    assert (decode.key, decode.settings.replicas, decode.settings.max_num_seqs) == ("decode", 3, 64)


def test_what_a_group_does_not_say_is_its_pools(tmp_path: Path) -> None:
    groups = by_key(load_config(write(tmp_path, UNLIKE), environ={}))
    assert list(groups) == ["prefill", "decode.h100", "decode.cpu"]
    h100, cpu = groups["decode.h100"], groups["decode.cpu"]
    assert (h100.section, h100.label) == ("decode.groups.h100", "decode-h100")
    assert (h100.settings.replicas, h100.settings.max_replicas, h100.settings.block_size) == (2, 4, 64)
    assert (h100.settings.resources, h100.settings.waits_for_nodes) == ({"h100": 1.0}, True)
    assert (cpu.settings.replicas, cpu.settings.max_num_seqs, cpu.settings.block_size) == (1, 48, 16)
    assert (cpu.settings.attention_backend, cpu.settings.resources) == ("TORCH_SDPA", None)


def test_of_two_ways_to_say_one_thing_a_groups_own_is_the_one(tmp_path: Path) -> None:
    groups = by_key(load_config(write(tmp_path, UNLIKE), environ={}))
    assert (groups["decode.h100"].settings.num_blocks, groups["decode.h100"].settings.kv_cache_gb) == (500, None)
    assert (groups["decode.cpu"].settings.num_blocks, groups["decode.cpu"].settings.kv_cache_gb) == (None, 1.5)


def test_a_list_with_names_is_the_same_as_a_mapping(tmp_path: Path) -> None:
    mapping = load_config(write(tmp_path, "decode: {groups: {a: {replicas: 2}, b: {}}}"), environ={})
    assert load_config(write(tmp_path, "decode: {groups: [{name: a, replicas: 2}, {name: b}]}"), environ={}) == mapping
    assert list(by_key(mapping)) == ["prefill", "decode.a", "decode.b"]
    assert load_config(write(tmp_path, "decode: {groups: {}}"), environ={}) == load_config(environ={})


def test_command_line_beats_environment_beats_file_in_a_group(tmp_path: Path) -> None:
    environ = {"BATON_DECODE__GROUPS__H100__REPLICAS": "3", "BATON_DECODE__GROUPS__CPU__THREADS": "2"}
    overrides = {"decode.groups.h100.replicas": "4", "decode.groups.cpu.labels": "zone=a", "decode.max_num_seqs": "8"}
    groups = by_key(load_config(write(tmp_path, UNLIKE), environ, overrides))
    assert (groups["decode.h100"].settings.replicas, groups["decode.cpu"].settings.threads) == (4, 2)
    assert groups["decode.cpu"].settings.labels == {"zone": "a"}
    assert groups["decode.h100"].settings.max_num_seqs == 8, "a pool's setting, whichever source has it"


def test_groups_need_no_file() -> None:
    groups = by_key(load_config(environ={"BATON_PREFILL__GROUPS__A__REPLICAS": "2"}))
    assert groups["prefill.a"].settings.replicas == 2
    config = load_config(environ={}, overrides={"prefill.groups": {"a": {"block_size": 32}, "b-2": None}})
    assert list(by_key(config)) == ["prefill.a", "prefill.b-2", "decode"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("decode: {groups: 3}", r"decode\.groups is 3, it must be a mapping of group names to settings"),
        ("decode: {groups: [a]}", r"decode\.groups has 'a', which must be a mapping of settings with a name"),
        ("decode: {groups: {a: 2}}", r"decode\.groups\.a is 2, it must be a mapping"),
        ("decode: {groups: [{name: a}, {name: a}]}", r"decode\.groups has a twice"),
        ("decode: {groups: {A: {}}}", r"a group 'A': a name has lower-case letters"),
        ("decode: {groups: {1: {}}}", r"a group 1: a name has"),
        ("decode: {groups: {a.b: {}}}", r"a group 'a\.b'"),
        (
            "decode: {groups: {a: {replica: 1}}}",
            r"decode\.groups\.a\.replica; did you mean decode\.groups\.a\.replicas",
        ),
        ("decode: {groups: {a: {groups: {}}}}", r"unknown configuration key decode\.groups\.a\.groups"),
        ("decode: {groups: {a: {replicas: x}}}", r"decode\.groups\.a\.replicas is 'x', it must be a whole number"),
        (
            "decode: {groups: {a: {replicas: 65}}}",
            r"a\.replicas is 65, it must be in \[1, 64\], decode\.groups\.a\.min_r",
        ),
        (
            "decode: {groups: {a: {num_blocks: 1, kv_cache_gb: 1}}}",
            r"decode\.groups\.a\.num_blocks and decode\.groups\.a",
        ),
        ("decode: {groups: {a: {labels: {x: y}}}}", r"decode\.groups\.a\.labels is set, but Ray is started on this"),
        ("server: {groups: {a: {}}}", r"unknown configuration key server\.groups"),
    ],
)
def test_a_wrong_group_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text), environ={})


@pytest.mark.parametrize(
    ("environ", "overrides", "message"),
    [
        (
            {},
            {"decode.groups.h10.replicas": "1"},
            r"unknown group decode\.groups\.h10; did you mean decode\.groups\.h100",
        ),
        ({"BATON_DECODE__GROUPS__H10__REPLICAS": "1"}, {}, r"unknown group decode\.groups\.h10; did you mean"),
        ({"BATON_DECODE__GROUPS__H100__REPLICAS": "x"}, {}, "BATON_DECODE__GROUPS__H100__REPLICAS is 'x'"),
        ({"BATON_DECODE__GROUPS": "h100"}, {}, r"decode\.groups is 'h100', .* decode\.groups\.NAME\.SETTING"),
        ({}, {"decode.groups.h100": "1"}, r"decode\.groups\.h100 is a group; name one of its settings"),
        ({}, {"decode.groups.h100.block_size": "0"}, r"decode\.groups\.h100\.block_size is 0, it must be at least 1"),
    ],
)
def test_a_wrong_key_of_a_group_is_refused(
    tmp_path: Path, environ: dict[str, str], overrides: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, UNLIKE), environ, overrides)


def test_a_group_may_begin_without_workers_if_another_has_some() -> None:
    settings = {"decode.groups": {"a": {}, "b": {"replicas": 0, "max_replicas": 3}}}
    a, b = (group.settings for group in groups_of(load_config(environ={}, overrides=settings))[1:])
    assert (a.fewest_replicas, b.replicas, b.fewest_replicas) == (1, 0, 0)
    settings["decode.groups"]["a"]["replicas"] = 0
    with pytest.raises(ConfigError, match=r"replicas is 0 in all decode\.groups, it must be at least 1 in one of them"):
        load_config(environ={}, overrides=settings)


def test_prefill_may_be_empty_where_nothing_is_sent_there() -> None:
    nobody = {"prefill.replicas": "0"}
    for always in ({}, {"router.disaggregation": "auto"}):
        with pytest.raises(ConfigError, match=r"prefill\.replicas is 0, it must be at least 1 unless router\.disagg"):
            load_config(environ={}, overrides={**nobody, **always})
    config = load_config(environ={}, overrides={**nobody, "router.disaggregation": "never"})
    assert (config.prefill.replicas, config.prefill.fewest_replicas) == (0, 0)
    with pytest.raises(ConfigError, match=r"decode\.replicas is 0, it must be at least 1$"):
        load_config(environ={}, overrides={"decode.replicas": "0", "router.disaggregation": "never"})

"""Whatever a file, the environment and the command line say: all of it is in force, or it is refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import Field
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from cluster.config.groups import group_settings
from cluster.config.load import load_config
from cluster.config.mappings import is_pairs, is_texts
from cluster.config.parse import kind_of
from cluster.config.schema import POOLS, SECTIONS, ServiceConfig, settings_of
from fuzzing import fuzzed
from workers.errors import ConfigError

pytestmark = pytest.mark.fuzz

TOGETHER = {
    *("tls_cert", "tls_key", "tls_client_ca", "auth_token", "auth_token_file", "api_keys", "port", "host"),
    *("replicas", "min_replicas", "max_replicas", "resources", "labels", "device", "num_gpus", "num_blocks"),
    *("attention_backend", "tensor_parallel_size", "tool_format", "reasoning_format", "groups", "folder", "path"),
    *("connector",),
}
"""Settings that go with others or with files: not every value of them is good."""
ALL = [(section, setting) for section, cls in SECTIONS.items() for setting in settings_of(cls)]
ALONE = [(section, setting) for section, setting in ALL if setting.name not in TOGETHER]
SOURCES = ("file", "environment", "command line")

words = st.from_regex(r"[a-z][a-z0-9.-]{0,8}", fullmatch=True).filter(lambda text: text not in ("none", "auto", "null"))
names = st.from_regex(r"[a-z]{1,6}", fullmatch=True)


def values_of(section: str, setting: Field[Any]) -> st.SearchStrategy[Any]:
    """Good values of a setting, of its own type."""
    kind, optional = kind_of(SECTIONS[section], setting.name)
    rules = setting.metadata
    if "choices" in rules:
        good = st.sampled_from(rules["choices"])
    elif kind is bool:
        good = st.booleans()
    elif kind is int:
        low = rules.get("low", -50)
        good = st.integers(low, min(rules.get("high", math.inf), low + 1000))
    elif kind is float:
        low, high = rules.get("low", rules.get("above", -50)), rules.get("high", 5000)
        good = st.floats(low, high, exclude_min="above" in rules, allow_nan=False)
    elif is_pairs(kind):
        amounts = st.floats(0.5, 9) if get_args(kind)[1] is float else words
        good = st.dictionaries(names, amounts, min_size=1, max_size=3)
    elif is_texts(kind):
        good = st.lists(words, min_size=1, max_size=3).map(tuple)
    else:
        good = words
    return st.one_of(st.none(), good) if optional else good


def written(value: Any) -> str:
    """A value as the environment and the command line have it."""
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return ",".join(f"{name}={each}" for name, each in value.items())
    return ",".join(value) if isinstance(value, tuple) else str(value)


class Said:
    """What was said of some settings, by source."""

    def __init__(self) -> None:
        self.file: dict[str, Any] = {}
        self.environment: dict[str, str] = {}
        self.overrides: dict[str, str] = {}

    def say(self, source: str, key: str, value: Any) -> None:
        if source == "environment":
            self.environment[f"BATON_{key.replace('.', '__').upper()}"] = written(value)
        elif source == "command line":
            self.overrides[key] = written(value)
        else:
            *sections, name = key.split(".")
            place = self.file
            for section in sections:
                place = place.setdefault(section, {})
            place[name] = list(value) if isinstance(value, tuple) else value

    def load(self, path: Path) -> ServiceConfig:
        path.write_text(yaml.safe_dump(self.file))
        return load_config(path, self.environment, self.overrides)


def in_force(config: ServiceConfig, key: str) -> Any:
    """What a key is in the end."""
    value: Any = config
    for name in key.split("."):
        value = value[name] if isinstance(value, Mapping) else getattr(value, name)
    return value


@st.composite
def settings_said(draw: st.DrawFn) -> tuple[Said, dict[str, Any]]:
    """Settings by several sources, and what is to be in force."""
    said, meant = Said(), {}
    for section, setting in draw(st.lists(st.sampled_from(ALONE), max_size=8)):
        key = f"{section}.{setting.name}"
        if key in meant or (setting.name == "kv_cache_gb" and section in POOLS):
            continue
        sources = sorted(draw(st.sets(st.sampled_from(SOURCES), min_size=1)), key=SOURCES.index)
        for source in sources:
            meant[key] = draw(values_of(section, setting))
            said.say(source, key, meant[key])
    for pool in draw(st.sets(st.sampled_from(POOLS))):
        alone = [s for s in settings_of(SECTIONS[pool]) if s.name in group_settings(SECTIONS[pool])]
        setting = draw(st.sampled_from([s for s in alone if s.name not in TOGETHER]))
        key = f"{pool}.groups.h100.{setting.name}"
        meant[key] = draw(values_of(pool, setting))
        said.say(draw(st.sampled_from(SOURCES)), key, meant[key])
    return said, meant


@fuzzed(50)
@given(settings_said())
def test_what_is_said_is_in_force_and_the_last_word_counts(tmp_path: Path, said_and_meant) -> None:
    said, meant = said_and_meant
    config = said.load(tmp_path / "service.yaml")
    for key, value in meant.items():
        assert in_force(config, key) == value, key
    default = load_config(environ={})
    for section, setting in ALONE:
        key = f"{section}.{setting.name}"
        if key not in meant:
            assert in_force(config, key) == in_force(default, key), key


spoilt_texts = st.one_of(
    st.sampled_from(
        ("", "nan", "inf", "-1e999", "1" * 5000, "0x10", "{}", "1,2", "=", "a=", "\0", "\udcff", "~nobody/x")
    ),
    st.text(max_size=6),
)
odd_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.just(10**400),
        st.floats(),
        st.text(max_size=5),
        st.sampled_from(("~nobody/x", "a\0b", "auto", "none")),
        st.dates(),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4) | st.integers(), inner)),
    max_leaves=5,
)
keys = st.one_of(
    st.sampled_from([f"{section}.{setting.name}" for section, setting in ALL]),
    st.sampled_from(
        ("decode.groups.a.block_size", "decode.groups.A.x", "decode.groups.a", "server.http", "sever.port")
    ),
    st.text(max_size=8),
)
entries = st.dictionaries(
    st.one_of(
        st.sampled_from([setting.name for _, setting in ALL]), st.just("http"), st.integers(), st.text(max_size=4)
    ),
    odd_values,
    max_size=3,
)


@fuzzed(50)
@example(b"server: {port: 1}\nserver: {auth_token: secret}\n", {}, {})
@example(b"server: {auth_token: secret, port: 7, auth_token: }\n", {}, {})
@example(b"server: {auth_token_file: ~nobody/token}\n", {}, {})
@example(b"server: {default_timeout_s: 1" + b"0" * 400 + b"}\n", {}, {})
@example(b"server: {default_timeout_s: 1" + b"0" * 5000 + b"}\n", {}, {})
@example(b"model: 2001-99-99\n", {}, {})
@example(b"[" * 3000, {}, {})
@example(b"", {"BATON_DECODE__groups__a__REPLICAS": "2", "BATON_DECODE__GROUPS__A__REPLICAS": "3"}, {})
@example(b"", {}, {"prefill.labels": "a=b,a=c"})
@example(b"", {}, {"server.auth_token_file": "a\0b"})
@example(b"server: {host: !!binary x}\n", {}, {})
@given(
    st.one_of(
        st.binary(max_size=40),
        st.dictionaries(st.sampled_from([*SECTIONS, "sever"]), entries, max_size=3).map(
            lambda document: yaml.safe_dump(document).encode(errors="surrogatepass")
        ),
    ),
    st.dictionaries(keys.map(lambda key: f"BATON_{key.replace('.', '__')}".upper()), spoilt_texts, max_size=2),
    st.dictionaries(keys, st.one_of(spoilt_texts, odd_values), max_size=2),
)
def test_what_cannot_be_is_refused_in_words(tmp_path: Path, document: bytes, environment, overrides) -> None:
    path = tmp_path / "service.yaml"
    path.write_bytes(document)
    try:
        config = load_config(path, environment, overrides)
    except ConfigError as error:
        refusal = str(error)
    else:
        assert isinstance(config, ServiceConfig)
        refusal = "none"
    assert 0 < len(refusal) < 3000


@pytest.mark.parametrize(
    "text",
    [
        "server: {port: 1}\nserver: {auth_token: secret}\n",
        "server: {auth_token: secret, port: 7, auth_token: other}\n",
        "decode: {groups: {a: {block_size: 16}, a: {block_size: 32}}}\n",
    ],
)
def test_a_key_that_is_there_twice_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "service.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="is there twice"):
        load_config(path, {})


@fuzzed(50)
@given(settings_said(), st.data())
def test_one_wrong_value_among_good_ones_refuses_all_by_its_name(tmp_path: Path, said_and_meant, data) -> None:
    said, _ = said_and_meant
    section, setting = data.draw(st.sampled_from(ALONE))
    key = f"{section}.{setting.name}"
    kind, _ = kind_of(SECTIONS[section], setting.name)
    wrong: list[Any] = ["\0"] if kind is str and "choices" not in setting.metadata else ["\0", "=,", "nan:1"]
    if kind in (int, float):
        wrong += ["nan", "1e999", "1" * 5000]
    said.say("command line", key, data.draw(st.sampled_from(wrong)))
    with pytest.raises(ConfigError) as refused:
        said.load(tmp_path / "service.yaml")
    assert key in str(refused.value)


@pytest.mark.parametrize("key", ["server.auth_token", "server.http.api_keys"])
def test_a_secret_of_the_wrong_type_is_not_shown(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} is something that is not shown"):
        load_config(environ={}, overrides={key: 918273})

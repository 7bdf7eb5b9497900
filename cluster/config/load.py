"""The one place that loads the service's configuration, and reads environment variables.

Defaults < YAML file < environment (`BATON_SECTION__KEY`) < command line (`--set section.key=value`, named flags). The
keys of a group of workers are longer: `decode.groups.NAME.key`, `BATON_DECODE__GROUPS__NAME__KEY`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.config.access import with_access
from cluster.config.groups import build_pool, merge_groups, parse_group_setting, read_groups
from cluster.config.home_path import home_path
from cluster.config.parse import build, check_key, parse_text
from cluster.config.rules import check_together
from cluster.config.schema import POOLS, SECTIONS, TOP_SECTIONS, ServiceConfig, sections_in, settings_of
from cluster.config.shown import shown
from cluster.config.yaml_file import read_yaml
from workers.errors import ConfigError

CLIENT_TOKEN_VARIABLE = "BATON_TOKEN"
CACHE_VARIABLE = "BATON_CACHE_DIR"
_BACKEND_VARIABLE = "BATON_ATTENTION_BACKEND"
_PREFIX = "BATON_"
_WORD_FOR_NONE = "none"
CUDA_DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"
_TRANSPORT_PREFIXES = ("UCX_", "NIXL_")
_Values = dict[str, dict[str, Any]]
"""By section and key; under the key "groups" of a pool, by group and key."""


def load_config(
    path: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> ServiceConfig:
    """Load the configuration from its sources, the later over the earlier.

    Args:
        path: YAML file of sections; None for none.
        environ: `BATON_SECTION__KEY=value`, and `BATON_ATTENTION_BACKEND` for both pools; None reads the process's own.
        overrides: "section.key" or "pool.groups.name.key" to a value, or to the text of one.

    Raises:
        ConfigError: an unknown key, a value of the wrong type or out of range, a file that cannot be read.
    """
    values: _Values = {name: {} for name in SECTIONS}
    if path is not None:
        _merge(values, _read_file(Path(path)))
    _merge(values, _read_environment(os.environ if environ is None else environ))
    _merge(values, _read_overrides(overrides or {}))
    built = {
        name: build_pool(name, cls, values[name]) if name in POOLS else build(name, cls, values[name])
        for name, cls in SECTIONS.items()
    }
    sections = {
        name: replace(built[name], **{inner: built[f"{name}.{inner}"] for inner in sections_in(cls)})
        for name, cls in TOP_SECTIONS.items()
    }
    config = ServiceConfig(**sections)
    check_together(config)
    return replace(config, server=with_access(config.server))


def client_token(environ: Mapping[str, str] | None = None) -> str | None:
    """The bearer token that client commands send, from BATON_TOKEN; None when it is not set."""
    return (os.environ if environ is None else environ).get(CLIENT_TOKEN_VARIABLE) or None


def transport_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables that say how KV cache travels: UCX's and NIXL's, and which GPUs there are."""
    variables = os.environ if environ is None else environ
    own = {name: value for name, value in variables.items() if name.startswith(_TRANSPORT_PREFIXES)}
    return own | {name: variables[name] for name in (CUDA_DEVICES_VARIABLE,) if name in variables}


def visible_gpus(environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; empty when it does not say."""
    variables = os.environ if environ is None else environ
    return tuple(name.strip() for name in variables.get(CUDA_DEVICES_VARIABLE, "").split(",") if name.strip())


def cache_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Where Baton keeps what it can find again: BATON_CACHE_DIR, else baton/ in XDG_CACHE_HOME, else ~/.cache/baton."""
    variables = os.environ if environ is None else environ
    if given := variables.get(CACHE_VARIABLE):
        return Path(given).expanduser()
    return Path(variables.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "baton"


def check_setting(key: str) -> None:
    """Refuse a "section.key" that names nothing.

    Raises:
        ConfigError: the text has the nearest key that exists.
    """
    check_key(key, [f"{section}.{f.name}" for section, cls in SECTIONS.items() for f in settings_of(cls)])


def describe_settings() -> str:
    """Every key with its default and meaning, one a line."""
    lines = []
    for section, cls in SECTIONS.items():
        for f in settings_of(cls):
            default = "-" if f.default is None else str(f.default)
            lines.append(f"  {section + '.' + f.name:<32} {default:<10} {f.metadata['doc']}")
    return "\n".join(lines)


def _read_file(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must be a mapping of sections ({', '.join(SECTIONS)}), not {shown(content)}")
    for section in content:
        check_key(str(section), list(TOP_SECTIONS))
    flat = {name: each for section, entries in content.items() for name, each in _flat(section, entries, path)}
    sections: dict[str, Any] = {
        section: _with_words(section, SECTIONS[section], _with_paths(SECTIONS[section], entries, path.parent))
        for section, entries in flat.items()
    }
    for pool in POOLS:
        if "groups" in sections.get(pool, {}):
            sections[pool]["groups"] = read_groups(pool, SECTIONS[pool], sections[pool]["groups"])
    return sections


def _flat(section: str, entries: object, path: Path) -> list[tuple[str, dict[str, Any]]]:
    """A section of a file and those in it, each with its own settings."""
    if not isinstance(entries, dict | None):
        raise ConfigError(f"section {section} in {path} must be a mapping of keys to values, not {shown(entries)}")
    inner = {name: f"{section}.{name}" for name in sections_in(SECTIONS[section])}
    own = {name: value for name, value in (entries or {}).items() if name not in inner}
    for name in own:
        check_setting(f"{section}.{name}")
    nested = [_flat(key, (entries or {})[name], path) for name, key in inner.items() if name in (entries or {})]
    return [(section, own), *(each for pairs in nested for each in pairs)]


def _with_paths(cls: type[Any], entries: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Entries of a file in this folder, whose paths are relative to it, wherever the command is started."""
    paths = {f.name for f in settings_of(cls) if f.metadata.get("is_path")}
    return {
        name: _path_from(folder, value, name)
        if name in paths and isinstance(value, str) and value.strip() and value != _WORD_FOR_NONE
        else value
        for name, value in entries.items()
    }


def _with_words(section: str, cls: type[Any], entries: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a file in which what may not be left blank is not blank; the word "none" stands for nothing.

    Raises:
        ConfigError: a blank one.
    """
    strict = {f.name for f in settings_of(cls) if f.metadata.get("not_blank")}
    for name, value in entries.items():
        if name in strict and value is None:
            raise ConfigError(f"{section}.{name} is empty; give a value, or {_WORD_FOR_NONE} to run without")
    return {n: None if n in strict and value == _WORD_FOR_NONE else value for n, value in entries.items()}


def _path_from(folder: Path, value: str, name: str) -> str:
    path = folder / home_path(value, name)
    # A model may as well be the id of a hub, which has the form of a relative path.
    may_be_hub_id = name == "path" and not value.startswith((".", "/", "~"))
    return value if may_be_hub_id and not path.exists() else str(path)


def ray_token_is_given(environ: Mapping[str, str] | None = None) -> bool:
    """Whether Ray has been told its token or to do without, so that it looks for none in the home folder."""
    variables = os.environ if environ is None else environ
    told = variables.get("RAY_AUTH_TOKEN") or variables.get("RAY_AUTH_TOKEN_PATH")
    return bool(told) or variables.get("RAY_AUTH_MODE", "token") != "token"


def ray_niceness_is_given(environ: Mapping[str, str] | None = None) -> bool:
    """Whether Ray has been told how nice the processes of its workers are to others."""
    return "RAY_worker_niceness" in (os.environ if environ is None else environ)


def keep_grpc_out_of_forks(environ: MutableMapping[str, str] | None = None) -> None:
    """Have gRPC do nothing where a process is forked, unless it is told to; to be called before it is imported.

    What this program forks becomes another program at once, so that gRPC has nothing to save there. Its handlers
    write to the terminal of who starts a service, and close what they do not own.
    """
    (os.environ if environ is None else environ).setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")


def _read_overrides(overrides: Mapping[str, Any]) -> _Values:
    values: _Values = {name: {} for name in SECTIONS}
    for key, value in overrides.items():
        if not _is_of_group(key):
            check_setting(key)
        _put(values, key, key, value)
    return values


def _read_environment(environ: Mapping[str, str]) -> _Values:
    values: _Values = {name: {} for name in SECTIONS}
    if backend := environ.get(_BACKEND_VARIABLE):
        values["prefill"]["attention_backend"] = values["decode"]["attention_backend"] = backend
    keys = [f"{section}.{f.name}" for section, cls in SECTIONS.items() for f in settings_of(cls)]
    known = {f"{_PREFIX}{key.replace('.', '__')}".upper(): key for key in keys}
    for variable, text in environ.items():
        # Without a double underscore it is somebody else's: a Kubernetes service named baton sets BATON_PORT and more.
        if not variable.startswith(_PREFIX) or "__" not in variable:
            continue
        if variable != variable.upper():
            raise ConfigError(f"unknown environment variable {variable}; did you mean {variable.upper()}?")
        key = variable.removeprefix(_PREFIX).lower().replace("__", ".")
        if not _is_of_group(key):
            check_key(variable, list(known), what="environment variable")
            key = known[variable]
        _put(values, key, variable, text)
    return values


def _is_of_group(key: str) -> bool:
    return any(key.startswith(f"{pool}.groups.") for pool in POOLS)


def _put(values: _Values, key: str, called: str, value: Any) -> None:
    """Set what a known key, or one of a group, says: a value, or the text of one. Messages have it as `called`."""
    section, _, name = key.partition(".") if _is_of_group(key) else key.rpartition(".")
    cls = SECTIONS[section]
    if _is_of_group(key):
        group, name, parsed = parse_group_setting(key, called, cls, value)
        values[section].setdefault("groups", {}).setdefault(group, {})[name] = parsed
    elif name == "groups":
        values[section][name] = read_groups(section, cls, value)
    else:
        values[section][name] = parse_text(called, cls, name, value) if isinstance(value, str) else value


def _merge(values: _Values, more: Mapping[str, Mapping[str, Any]]) -> None:
    for section, entries in more.items():
        groups = merge_groups(section, values[section].get("groups", {}), entries.get("groups", {}))
        values[section].update(entries)
        if groups:
            values[section]["groups"] = groups

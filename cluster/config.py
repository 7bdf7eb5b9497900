"""The one place that loads the service's configuration, and reads environment variables.

Defaults < YAML file < environment (`BATON_SECTION__KEY`) < command line (`--set section.key=value`, named flags).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from cluster.config_rules import check_together
from cluster.config_sections import SECTIONS, ServiceConfig
from cluster.settings import build, check_key, parse_text
from workers.errors import ConfigError

CLIENT_TOKEN_VARIABLE = "BATON_TOKEN"
CACHE_VARIABLE = "BATON_CACHE_DIR"
_BACKEND_VARIABLE = "BATON_ATTENTION_BACKEND"
_PREFIX = "BATON_"
CUDA_DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"
_TRANSPORT_PREFIXES = ("UCX_", "NIXL_")


def load_config(
    path: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> ServiceConfig:
    """Load the configuration from its sources, the later over the earlier.

    Args:
        path: YAML file of sections; None for none.
        environ: `BATON_SECTION__KEY=value`, and `BATON_ATTENTION_BACKEND` for both pools; None reads the process's own.
        overrides: "section.key" to a value, or to the text of one.

    Raises:
        ConfigError: an unknown key, a value of the wrong type or out of range, a file that cannot be read.
    """
    values: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    if path is not None:
        _merge(values, _read_file(Path(path)))
    _merge(values, _read_environment(os.environ if environ is None else environ))
    for key, value in (overrides or {}).items():
        section, name = split_key(key)
        values[section][name] = parse_text(key, SECTIONS[section], name, value) if isinstance(value, str) else value
    config = ServiceConfig(**{name: build(name, cls, values[name]) for name, cls in SECTIONS.items()})
    check_together(config)
    return _with_token(config)


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


def split_key(key: str) -> tuple[str, str]:
    """Split "section.key" and check both parts.

    Raises:
        ConfigError: it names nothing; the text has the nearest key that exists.
    """
    known = [f"{section}.{f.name}" for section, cls in SECTIONS.items() for f in fields(cls)]
    check_key(key, known)
    section, _, name = key.partition(".")
    return section, name


def describe_settings() -> str:
    """Every key with its default and meaning, one a line."""
    lines = []
    for section, cls in SECTIONS.items():
        for f in fields(cls):
            default = "-" if f.default is None else str(f.default)
            lines.append(f"  {section + '.' + f.name:<32} {default:<10} {f.metadata['doc']}")
    return "\n".join(lines)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"cannot read the configuration file {path}: {reason}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must be a mapping of sections ({', '.join(SECTIONS)}), not {content!r:.80}")
    for section, entries in content.items():
        check_key(str(section), list(SECTIONS))
        if not isinstance(entries, dict | None):
            raise ConfigError(f"section {section} in {path} must be a mapping of keys to values, not {entries!r}")
        for name in entries or {}:
            split_key(f"{section}.{name}")
    return {section: entries or {} for section, entries in content.items()}


def _read_environment(environ: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    values: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    if backend := environ.get(_BACKEND_VARIABLE):
        values["prefill"]["attention_backend"] = values["decode"]["attention_backend"] = backend
    known = {f"{_PREFIX}{s}__{f.name}".upper(): (s, f.name) for s, cls in SECTIONS.items() for f in fields(cls)}
    for variable, text in environ.items():
        # Without a double underscore it is somebody else's: a Kubernetes service named baton sets BATON_PORT and more.
        if not variable.startswith(_PREFIX) or "__" not in variable:
            continue
        check_key(variable, list(known), what="environment variable")
        section, name = known[variable]
        values[section][name] = parse_text(variable, SECTIONS[section], name, text)
    return values


def _merge(values: dict[str, dict[str, Any]], more: Mapping[str, Mapping[str, Any]]) -> None:
    for section, entries in more.items():
        values[section].update(entries)


def _with_token(config: ServiceConfig) -> ServiceConfig:
    """Put the content of `server.auth_token_file` into `server.auth_token`."""
    path = config.server.auth_token_file
    if path is None:
        return config
    try:
        token = Path(path).expanduser().read_text(encoding="ascii").strip()
    except OSError as error:
        raise ConfigError(f"cannot read server.auth_token_file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"server.auth_token_file {path} holds characters that a gRPC header cannot carry") from error
    if not token:
        raise ConfigError(f"server.auth_token_file {path} is empty")
    return replace(config, server=replace(config.server, auth_token=token))

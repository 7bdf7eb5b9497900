"""The service's configuration: what it consists of, and the one place that loads it.

Defaults < YAML file < environment (`BATON_SECTION__KEY`) < command line (`--set section.key=value`, named flags).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from cluster.settings import build, check_key, parse_text
from workers.errors import ConfigError


def _setting(default: Any, doc: str, **rules: Any) -> Any:
    """A field with its description and the rules of `cluster.settings.build`."""
    return field(default=default, repr=not rules.get("secret", False), metadata={"doc": doc, **rules})


@dataclass(frozen=True)
class ModelConfig:
    """What is served."""

    path: str | None = _setting(
        None, "checkpoint: a local folder or a Hugging Face hub id; default: the one that comes with Baton"
    )
    served_name: str | None = _setting(None, "the name clients know it by; default: the last part of the path")
    dtype: str = _setting("auto", "auto takes the checkpoint's own", choices=("auto", "float32", "bfloat16", "float16"))
    max_model_len: int | None = _setting(None, "tokens of prompt and answer together; default: the model's own", low=1)
    load_format: str = _setting("auto", "dummy gives random weights", choices=("auto", "dummy"))


@dataclass(frozen=True)
class ServerConfig:
    """The gRPC server."""

    host: str = _setting("127.0.0.1", "address to listen on; only this machine by default")
    port: int = _setting(50051, "0 takes a free one", low=0, high=65535)
    tls_cert: str | None = _setting(None, "PEM file with the certificate chain; turns TLS on")
    tls_key: str | None = _setting(None, "PEM file with the certificate's key")
    tls_client_ca: str | None = _setting(None, "PEM file; clients must show a certificate signed by one of these")
    auth_token: str | None = _setting(None, "bearer token that every call must carry", secret=True)
    auth_token_file: str | None = _setting(None, "file that holds the bearer token")
    default_timeout_s: float = _setting(600.0, "deadline of a call that brings none", above=0)
    max_queue: int = _setting(256, "requests that may wait; more are refused at once", low=0)
    max_queue_wait_s: float = _setting(
        30.0, "the longest wait before a prompt is computed; who would wait longer is refused at once", above=0
    )
    max_concurrent_rpcs: int | None = _setting(None, "calls in progress at once, of any kind", low=1)
    reflection: bool = _setting(True, "let clients such as grpcurl ask for the interface")


@dataclass(frozen=True)
class PoolConfig:
    """A pool of equal workers.

    A worker's KV cache has `num_blocks` blocks, or as many as fit in `kv_cache_gb`, or what `gpu_memory_utilization`
    leaves of a GPU's memory, or a share of the host's. Of several ranks each has as many blocks, with its share of the
    heads.
    """

    replicas: int = _setting(1, "workers in the pool to begin with; `baton scale` changes it", low=1)
    min_replicas: int = _setting(1, "workers in the pool at least, however it is scaled", low=1)
    max_replicas: int = _setting(64, "workers in the pool at most, however it is scaled", low=1, high=4096)
    drain_timeout_s: float = _setting(
        60.0, "a worker that leaves may finish its requests for so long; then other workers go on with them", low=0
    )
    tensor_parallel_size: int = _setting(
        1, "ranks that share the model in a worker, each a process with a device of its own", choices=(1, 2, 4, 8, 16)
    )
    num_cpus: float = _setting(1.0, "CPUs that Ray reserves for each rank of a worker", low=0)
    num_gpus: float | None = _setting(
        None,
        "GPUs that Ray reserves for each rank of a worker; default: on cuda 1, or a part where there are too few",
        low=0,
    )
    resources: Mapping[str, float] | None = _setting(
        None, "Ray resources of your own for each rank, such as decode=1: its nodes are those that offer them", above=0
    )
    labels: Mapping[str, str] | None = _setting(None, "labels that a node must have, such as baton/pool=decode")
    device: str = _setting(
        "auto", "auto, cpu or cuda; auto takes the GPUs that Ray has", choices=("auto", "cpu", "cuda")
    )
    gpu_memory_utilization: float | None = _setting(
        None,
        "share of a GPU's memory for a worker; default: 0.9, or a part of it where workers share",
        above=0,
        high=1,
    )
    threads: int | None = _setting(None, "CPU threads of a worker; default: its share of the cores", low=1)
    attention_backend: str | None = _setting(None, "backend by name, such as FLASHINFER; default: the best that runs")
    enforce_eager: bool = _setting(False, "run the model without CUDA graphs")
    block_size: int | None = _setting(None, "tokens per KV block; default: 64 on cuda, else 16", low=1, high=1024)
    kv_cache_dtype: str = _setting("auto", "auto as the model computes, fp8 for half the size", choices=("auto", "fp8"))
    kv_cache_gb: float | None = _setting(None, "size of a worker's KV cache in GB (10^9 bytes)", above=0)
    num_blocks: int | None = _setting(None, "size of a worker's KV cache in blocks", low=1)
    max_num_seqs: int = _setting(16, "sequences in a batch", low=1)
    max_num_batched_tokens: int = _setting(2048, "tokens computed in one step; longer prompts go in chunks", low=1)

    @property
    def waits_for_nodes(self) -> bool:
        """Whether it has nodes of its own kind, which may still come."""
        return bool(self.resources or self.labels)


@dataclass(frozen=True)
class PrefillPoolConfig(PoolConfig):
    """The prefill pool: as `PoolConfig`, with a prefix cache."""

    enable_prefix_caching: bool = _setting(True, "keep the KV blocks of prompts for those that begin alike")


@dataclass(frozen=True)
class DecodePoolConfig(PoolConfig):
    """The decode pool: as `PoolConfig`, with a larger batch."""

    max_num_seqs: int = _setting(64, "sequences in a batch", low=1)


@dataclass(frozen=True)
class HandoffConfig:
    """How the KV cache travels."""

    connector: str = _setting("nixl", "local only within one process", choices=("nixl", "local"))
    layers_per_group: int | None = _setting(
        None, "layers that are sent together; auto: by what sending costs and computing hides", low=1
    )
    timeout_s: float = _setting(30.0, "a handoff that is not complete by then has failed", above=0)


@dataclass(frozen=True)
class AutoscalerConfig:
    """When pools grow and shrink by themselves, between their min_replicas and max_replicas."""

    mode: str = _setting("off", "dry-run says what it would do, and why", choices=("off", "dry-run", "on"))
    ttft_s: float = _setting(1.0, "objective of the prefill pool: 90 % of prompts take no longer there", above=0)
    itl_s: float = _setting(0.05, "objective of the decode pool: mean time between tokens", above=0)
    occupancy: float = _setting(
        0.9, "share of KV blocks or batch that a pool should have taken at most", above=0, high=1
    )
    queue_per_worker: float = _setting(4.0, "requests for each worker that should wait at most", above=0)
    shrink_below: float = _setting(
        0.5, "a pool shrinks when it bears less than this part of what it should bear at most", above=0, high=0.9
    )
    interval_s: float = _setting(5.0, "from one look at the pools to the next", above=0)
    grow_after_s: float = _setting(15.0, "the pressure must have been high for so long", low=0)
    shrink_after_s: float = _setting(300.0, "the pressure must have been low for so long", low=0)
    cooldown_s: float = _setting(30.0, "from one change of a pool to its next", low=0)
    grow_step: int = _setting(2, "workers added at once, at most", low=1)
    shrink_step: int = _setting(1, "workers taken away at once, at most", low=1)


@dataclass(frozen=True)
class RayConfig:
    """The Ray cluster."""

    address: str | None = _setting(None, "cluster to join, such as auto or HOST:6379; default: start one here")
    namespace: str = _setting("baton", "Ray namespace of the actors")


@dataclass(frozen=True)
class ServiceConfig:
    """Everything that `baton up` can be told, by section."""

    model: ModelConfig = ModelConfig()
    server: ServerConfig = ServerConfig()
    prefill: PrefillPoolConfig = PrefillPoolConfig()
    decode: DecodePoolConfig = DecodePoolConfig()
    handoff: HandoffConfig = HandoffConfig()
    autoscaler: AutoscalerConfig = AutoscalerConfig()
    ray: RayConfig = RayConfig()


SECTIONS: dict[str, type[Any]] = get_type_hints(ServiceConfig)

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
    return _with_token(_checked(config))


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


def _checked(config: ServiceConfig) -> ServiceConfig:
    """The rules that concern more than one key."""
    server = config.server
    if (server.tls_cert is None) != (server.tls_key is None):
        missing = "server.tls_key" if server.tls_key is None else "server.tls_cert"
        raise ConfigError(f"TLS needs both server.tls_cert and server.tls_key; {missing} is not set")
    if server.tls_client_ca is not None and server.tls_cert is None:
        raise ConfigError("server.tls_client_ca is set without server.tls_cert: client certificates need TLS")
    if server.auth_token is not None and server.auth_token_file is not None:
        raise ConfigError("both server.auth_token and server.auth_token_file are set; give one")
    for name, pool in (("prefill", config.prefill), ("decode", config.decode)):
        if pool.num_blocks is not None and pool.kv_cache_gb is not None:
            raise ConfigError(f"both {name}.num_blocks and {name}.kv_cache_gb are set; give one")
        if not pool.min_replicas <= pool.replicas <= pool.max_replicas:
            raise ConfigError(
                f"{name}.replicas is {pool.replicas}, it must be in [{pool.min_replicas}, {pool.max_replicas}], "
                f"{name}.min_replicas and {name}.max_replicas"
            )
        _check_nodes(name, pool, config.ray.address)
        if pool.tensor_parallel_size > 1 and config.handoff.connector == "local":
            raise ConfigError(
                f"{name}.tensor_parallel_size is {pool.tensor_parallel_size}, it must be 1 with handoff.connector "
                "local: ranks are processes, and local means one"
            )
    return config


def _check_nodes(name: str, pool: PoolConfig, address: str | None) -> None:
    """The rules for a pool that has nodes of its own kind."""
    for key, value in (("resources", pool.resources), ("labels", pool.labels)):
        if value and address is None:
            raise ConfigError(
                f"{name}.{key} is set, but Ray is started on this machine; set ray.address to join a cluster"
            )
    for resource, setting in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
        if resource in (pool.resources or {}):
            raise ConfigError(f"{name}.resources has {resource}, which {setting} says")


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

"""The rules that concern more than one setting."""

from __future__ import annotations

from cluster.config.access import DEFAULT_HTTP_PORT
from cluster.config.groups import groups_of
from cluster.config.schema import POOLS, PoolConfig, ServerConfig, ServiceConfig
from cluster.conversation.registry import choose_formats
from workers.errors import ConfigError

_NO_ATTENTION = "NO_ATTENTION"


def may_be_empty(role: str, config: ServiceConfig) -> bool:
    """Whether a pool may have no workers: prefill, where every prompt is computed on its decode worker."""
    return role == "prefill" and config.router.disaggregation == "never"


def check_together(config: ServiceConfig) -> None:
    """Refuse settings that do not go together.

    Raises:
        ConfigError: the first rule that is broken.
    """
    server = config.server
    _check_tls("server", server.tls_cert, server.tls_key)
    if server.tls_client_ca is not None and server.tls_cert is None:
        raise ConfigError("server.tls_client_ca is set without server.tls_cert: client certificates need TLS")
    if server.auth_token is not None and server.auth_token_file is not None:
        raise ConfigError("both server.auth_token and server.auth_token_file are set; give one")
    _check_http(server)
    choose_formats(config.model.tool_format, config.model.reasoning_format, "")
    for group in groups_of(config):
        _check_group(group.section, group.settings, config)
    for role in POOLS:
        _check_somebody_is_there(role, config)


def _check_tls(section: str, cert: str | None, key: str | None) -> None:
    """A certificate needs its key."""
    if (cert is None) != (key is None):
        missing = f"{section}.tls_key" if key is None else f"{section}.tls_cert"
        raise ConfigError(f"TLS needs both {section}.tls_cert and {section}.tls_key; {missing} is not set")


def _check_http(server: ServerConfig) -> None:
    """The rules for the second door."""
    http = server.http
    _check_tls("server.http", http.tls_cert, http.tls_key)
    if http.tls_client_ca is not None and http.tls_cert is None and server.tls_cert is None:
        raise ConfigError("server.http.tls_client_ca is set without server.http.tls_cert: client certificates need TLS")
    port = DEFAULT_HTTP_PORT if http.port is None else http.port
    if http.enabled and port and (http.host, port) == (server.host, server.port):
        raise ConfigError(
            f"server.port and server.http.port are both {port}: give one of them another, or set "
            "server.http.enabled=false"
        )


def _check_group(name: str, pool: PoolConfig, config: ServiceConfig) -> None:
    """The rules for equal workers; `name` is where their settings are."""
    if pool.num_blocks is not None and pool.kv_cache_gb is not None:
        raise ConfigError(f"both {name}.num_blocks and {name}.kv_cache_gb are set; give one")
    if not pool.fewest_replicas <= pool.replicas <= pool.max_replicas:
        raise ConfigError(
            f"{name}.replicas is {pool.replicas}, it must be in [{pool.fewest_replicas}, {pool.max_replicas}], "
            f"{name}.min_replicas and {name}.max_replicas"
        )
    _check_nodes(name, pool, config.ray.address)
    if pool.device == "cpu" and pool.num_gpus:
        raise ConfigError(f"{name}.num_gpus is {pool.num_gpus:g} and {name}.device is cpu; give one")
    if (pool.attention_backend or "").upper() == _NO_ATTENTION and not config.model.without_attention:
        raise ConfigError(
            f"{name}.attention_backend is {_NO_ATTENTION}, which attends to nothing: its answers mean nothing; set "
            "model.without_attention=true if that is what you want"
        )
    if pool.tensor_parallel_size > 1 and config.handoff.connector == "local":
        raise ConfigError(
            f"{name}.tensor_parallel_size is {pool.tensor_parallel_size}, it must be 1 with handoff.connector "
            "local: ranks are processes, and local means one"
        )


def _check_somebody_is_there(role: str, config: ServiceConfig) -> None:
    """A pool must have workers, or nobody needs it."""
    if may_be_empty(role, config):
        return
    groups = [group for group in groups_of(config) if group.role == role]
    if any(group.settings.replicas for group in groups):
        return
    unless = " unless router.disaggregation is never" if role == "prefill" else ""
    if len(groups) == 1:
        raise ConfigError(f"{groups[0].section}.replicas is 0, it must be at least 1{unless}")
    raise ConfigError(f"replicas is 0 in all {role}.groups, it must be at least 1 in one of them{unless}")


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

"""Groups of unlike workers within a pool: how they are written down, and what each of them is in the end.

A group has a name and settings; what it does not say is its pool's. A pool that names no groups is one, without a name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from cluster.config.group_key import group_key
from cluster.config.parse import build, check_key, parse_text
from cluster.config.schema import PoolConfig, ServiceConfig
from cluster.config.shown import shown
from workers.errors import ConfigError

Groups = dict[str, dict[str, Any]]
"""By group name, what it says itself."""

_Pool = TypeVar("_Pool", bound=PoolConfig)
_NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
_LONGEST_NAME = 32
_EITHER = {"num_blocks": "kv_cache_gb", "kv_cache_gb": "num_blocks"}
"""Two ways to say one thing: a group that uses one does not take over the other from its pool."""


@dataclass(frozen=True)
class WorkerGroup:
    """Equal workers of one pool.

    Attributes:
        role: the pool, prefill or decode.
        name: of the group; empty for the only one of a pool that names none.
        settings: the pool's, with the group's own over them.
    """

    role: str
    name: str
    settings: PoolConfig

    @property
    def key(self) -> str:
        """What `baton scale` knows it by: decode, or decode.h100."""
        return group_key(self.role, self.name)

    @property
    def section(self) -> str:
        """Where the configuration has it: decode, or decode.groups.h100."""
        return f"{self.role}.groups.{self.name}" if self.name else self.role

    @property
    def label(self) -> str:
        """What its workers' names begin with: decode, or decode-h100."""
        return f"{self.role}-{self.name}" if self.name else self.role

    @property
    def ranks(self) -> int:
        """Of all workers to begin with."""
        return self.settings.replicas * self.settings.tensor_parallel_size


def groups_of(config: ServiceConfig) -> list[WorkerGroup]:
    """All groups, prefill first, each pool's in the order in which they were named."""
    pools: dict[str, PoolConfig] = {"prefill": config.prefill, "decode": config.decode}
    return [
        WorkerGroup(role, name, settings)
        for role, pool in pools.items()
        for name, settings in (pool.groups or {"": pool}).items()
    ]


def read_groups(pool: str, cls: type[PoolConfig], given: object) -> Groups:
    """The groups of a pool as a file has them: a mapping of names to settings, or a list of settings with a `name`.

    Raises:
        ConfigError: it is neither, a name or a setting is wrong, or a name is there twice.
    """
    section = f"{pool}.groups"
    if given is None:
        return {}
    if isinstance(given, list):
        named = [_named(section, entry) for entry in given]
    elif isinstance(given, dict):
        named = list(given.items())
    else:
        raise ConfigError(
            f"{section} is {shown(given)}, it must be a mapping of group names to settings; the key of one setting is "
            f"{section}.NAME.SETTING"
        )
    groups: Groups = {}
    for name, settings in named:
        check_group_name(section, name)
        if name in groups:
            raise ConfigError(f"{section} has {name} twice")
        if not isinstance(settings, dict | None):
            raise ConfigError(f"{section}.{name} is {shown(settings)}, it must be a mapping of keys to values")
        for key in settings or {}:
            check_key(f"{section}.{name}.{key}", [f"{section}.{name}.{known}" for known in group_settings(cls)])
        groups[name] = dict(settings or {})
    return groups


def group_settings(cls: type[PoolConfig]) -> list[str]:
    """The settings that a group of a pool may have of its own: all but groups."""
    return [f.name for f in fields(cls) if f.name != "groups"]


def check_group_name(section: str, name: object) -> None:
    """Refuse a name that cannot be part of a worker's, a key and a variable.

    Raises:
        ConfigError: it is no such name.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
        raise ConfigError(
            f"{section} has a group {shown(name)}: a name has lower-case letters and digits with single - or _ between "
            f"them, begins with a letter, and is at most {_LONGEST_NAME} long"
        )


def parse_group_setting(key: str, called: str, cls: type[PoolConfig], value: Any) -> tuple[str, str, Any]:
    """What "decode.groups.NAME.SETTING" says: the group's name, the setting's, and the value.

    Args:
        key: the setting's.
        called: how messages about the value name it.
        cls: the pool's settings.
        value: or the text of one, which is parsed.

    Raises:
        ConfigError: the key or the value is wrong.
    """
    section, _, rest = key.partition(".groups.")
    group, _, name = rest.partition(".")
    check_group_name(f"{section}.groups", group)
    if not name:
        raise ConfigError(f"{key} is a group; name one of its settings, such as {key}.replicas")
    check_key(key, [f"{section}.groups.{group}.{known}" for known in group_settings(cls)])
    return group, name, parse_text(called, cls, name, value) if isinstance(value, str) else value


def merge_groups(pool: str, below: Groups, above: Groups) -> Groups:
    """The groups of two sources, the later over the earlier. Where the earlier names groups, the later adds none.

    Raises:
        ConfigError: it does.
    """
    if below:
        for name in above:
            check_key(f"{pool}.groups.{name}", [f"{pool}.groups.{known}" for known in below], what="group")
    return {name: below.get(name, {}) | above.get(name, {}) for name in {**below, **above}}


def build_pool(pool: str, cls: type[_Pool], values: Mapping[str, Any]) -> _Pool:
    """Make a pool's settings, with those of its groups.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """
    own = {name: value for name, value in values.items() if name != "groups"}
    built = build(pool, cls, own)
    groups = {}
    for group, said in values.get("groups", {}).items():
        inherited = {name: value for name, value in own.items() if _EITHER.get(name) not in said}
        groups[group] = build(f"{pool}.groups.{group}", cls, inherited | said)
    return replace(built, groups=groups or None)


def _named(section: str, entry: object) -> tuple[Any, dict[str, Any]]:
    if not isinstance(entry, dict) or "name" not in entry:
        raise ConfigError(f"{section} has {shown(entry)}, which must be a mapping of settings with a name")
    return entry["name"], {key: value for key, value in entry.items() if key != "name"}

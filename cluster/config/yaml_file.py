"""Reading a YAML file of which everything counts: a key that is there twice is refused, not taken by half."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from workers.errors import ConfigError


class _StrictLoader(yaml.SafeLoader):
    """As the safe loader, which of equal keys would take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = (key_node.tag, str(key_node.value))
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    "while reading a mapping",
                    node.start_mark,
                    f"{key_node.value!r:.80} is there twice",
                    key_node.start_mark,
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """What a file says.

    Raises:
        ConfigError: it cannot be read, or is no YAML, or has a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except ValueError as error:  # UnicodeDecodeError is one, and so is a name that no file can have
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error
        raise ConfigError(f"cannot read the configuration file {path}: {reason}") from error
    try:
        return yaml.load(text, _StrictLoader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # dates and numbers that cannot be raise the others
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply") from error

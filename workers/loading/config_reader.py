"""Reading values of a known type out of a checkpoint's JSON, with errors that name the file and the key."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from workers.errors import CheckpointError

_Number = TypeVar("_Number", int, float)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: no such file, or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


STATED = frozenset(
    {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
    | {"max_position_embeddings", "num_experts_per_tok", "num_experts", "num_local_experts", "moe_intermediate_size"}
    | {"shared_expert_intermediate_size", "intermediate_size_mlp"}
    | {"n_routed_experts", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"}
)
"""Keys without which a config.json describes no model: nobody's default is taken for them."""


class ConfigReader:
    """Typed access to one JSON object; a null counts as absent.

    What is absent and has no default where it is read is taken from `defaults`, unless it is one of `STATED`.

    Attributes:
        values: the object.
        asked: keys that were read.
        parts: of objects inside it, those that were read.
        source: the file, named in errors.
        prefix: put before keys in errors, for objects inside objects.

    Args:
        values: see above.
        source: see above.
        prefix: see above.
        defaults: of keys that are absent; asked once, when the first is needed.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        source: str,
        prefix: str = "",
        defaults: Callable[[], Mapping[str, Any]] | None = None,
    ) -> None:
        self.values = values
        self.asked: set[str] = set()
        self.parts: list[ConfigReader] = []
        self._defaults = defaults
        self.source = source
        self.prefix = prefix

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def error(self, key: str, problem: str) -> CheckpointError:
        """An error that names the file and the key."""
        return CheckpointError(f"{self.source}: {self.prefix}{key}: {problem}")

    def refuse_others(self, supported: Mapping[str, Any]) -> None:
        """Let keys that only some values are supported of be absent or have them.

        Args:
            supported: the value of each key.

        Raises:
            CheckpointError: another value; names file, key, and both values.
        """
        for key, value in supported.items():
            stated = self.get(key)
            if stated is not None and stated != value:
                raise self.error(key, f"{stated!r} is not supported for this architecture, only {value!r}")

    def get(self, key: str) -> Any:
        """The value as it is, None when absent."""
        return self._stated(key)

    def get_or_default(self, key: str) -> Any:
        """The value as it is, or what `defaults` has, where the key is absent; a null stays one."""
        self.asked.add(key)
        return self.values[key] if key in self.values else self._default(key)

    def inside(self, key: str, shared: Iterable[str] = ()) -> ConfigReader:
        """The object at `key`, such as that of the text model in a multi-modal one's.

        Such objects leave out whatever is a default of theirs: for them all of `defaults` counts, sizes too.

        Args:
            key: it must be there.
            shared: keys whose values beside the object count where it has none.
        """
        given, default = self._stated(key), self._default(key) or {}
        if not isinstance(given, Mapping):
            raise self.error(key, f"must be an object, not {given!r}")
        values = {name: default[name] for name in STATED if name in default}
        values |= {name: self.values[name] for name in shared if self._stated(name) is not None}
        values |= {name: value for name, value in given.items() if value is not None or name not in values}
        part = ConfigReader(values, self.source, f"{self.prefix}{key}.", lambda: default)
        self.parts.append(part)
        return part

    def optional_int(self, key: str) -> int | None:
        """An integer, or None when absent."""
        value = self._stated(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise self.error(key, f"must be an integer, not {value!r}")
        return value

    def optional_positive_int(self, key: str) -> int | None:
        """An integer of at least 1, or None when absent."""
        value = self.optional_int(key)
        if value is not None and value < 1:
            raise self.error(key, f"must be at least 1, not {value}")
        return value

    def positive_int(self, key: str, default: int | None = None) -> int:
        """An integer of at least 1; without a default it must be there."""
        value = self.optional_positive_int(key)
        return self._present(key, default if value is None else value)

    def non_negative_int(self, key: str, default: int | None = None) -> int:
        """An integer of at least 0; without a default it must be there."""
        value = self.optional_int(key)
        if value is not None and value < 0:
            raise self.error(key, f"must be at least 0, not {value}")
        return self._present(key, default if value is None else value)

    def positive_float(self, key: str, default: float | None = None) -> float:
        """A number above 0; without a default it must be there."""
        value = self._stated(key)
        if value is None:
            return self._present(key, default)
        if not _is_finite(value) or value <= 0:
            raise self.error(key, f"must be a number above 0, not {value!r}")
        return float(value)

    def optional_positive_float(self, key: str) -> float | None:
        """A number above 0, or None for a null; where the key is absent what `defaults` has."""
        value = self.get_or_default(key)
        if value is not None and (not _is_finite(value) or value <= 0):
            raise self.error(key, f"must be null or a number above 0, not {value!r}")
        return None if value is None else float(value)

    def non_negative_float(self, key: str, default: float | None = None) -> float:
        """A number of at least 0; without a default it must be there."""
        value = self._stated(key)
        if value is None:
            return self._present(key, default)
        if not _is_finite(value) or value < 0:
            raise self.error(key, f"must be a number of at least 0, not {value!r}")
        return float(value)

    def positive_float_list(self, key: str) -> tuple[float, ...]:
        """A list of numbers above 0, which must be there."""
        values = self._stated(key)
        if values is None:
            raise self.error(key, "is missing")
        if not isinstance(values, list) or not all(_is_finite(value) and value > 0 for value in values):
            raise self.error(key, f"must be a list of numbers above 0, not {values!r}")
        return tuple(map(float, values))

    def flag(self, key: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self._stated(key)
        if value is None:
            return bool(self._present(key, default))
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {value!r}")
        return value

    def int_list(self, key: str) -> list[int]:
        """An integer or a list of integers, as a list; empty when absent."""
        value = self._stated(key)
        if value is None:
            return []
        items = value if isinstance(value, list) else [value]
        if any(not isinstance(item, int) or isinstance(item, bool) for item in items):
            raise self.error(key, f"must be an integer or a list of integers, not {value!r}")
        return items

    def _stated(self, key: str) -> Any:
        self.asked.add(key)
        return self.values.get(key)

    def _present(self, key: str, value: _Number | None) -> _Number:
        if value is None:
            value = self._default(key)
        if value is None:
            raise self.error(key, "is missing")
        return value

    def _default(self, key: str) -> Any:
        return None if self._defaults is None or key in STATED else self._defaults().get(key)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

"""`handoff.layers_per_write` is auto, or a number."""

from __future__ import annotations

import pytest

from cluster.config.load import load_config
from workers.errors import ConfigError


@pytest.mark.parametrize("value", ["auto", "AUTO", "none", None])
def test_auto_leaves_it_to_the_path(value):
    assert load_config(environ={}).handoff.layers_per_write is None
    assert load_config(environ={}, overrides={"handoff.layers_per_write": value}).handoff.layers_per_write is None


def test_a_file_may_say_auto_or_a_number(tmp_path):
    for text, expected in (("auto", None), ("4", 4)):
        path = tmp_path / "service.yaml"
        path.write_text(f"handoff:\n  layers_per_write: {text}\n")
        assert load_config(path, environ={}).handoff.layers_per_write == expected


@pytest.mark.parametrize("value", ["0", "many", "1.5"])
def test_anything_else_is_refused(value):
    with pytest.raises(ConfigError, match=r"handoff\.layers_per_write"):
        load_config(environ={}, overrides={"handoff.layers_per_write": value})

"""What a checkpoint's generation_config.json says of sampling."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from cluster.text.sampling_defaults import read_sampling_defaults, with_defaults
from workers.errors import CheckpointError, InvalidRequestError
from workers.sampling_params import SamplingParams


def written(folder: Path, content: object) -> Path:
    (folder / "generation_config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_the_values_that_a_request_may_have_are_taken(tmp_path: Path) -> None:
    given = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": None, "repetition_penalty": 1.05}
    content = {**given, "max_new_tokens": 64, "do_sample": False, "eos_token_id": 2, "num_beams": 4}
    expected = {name: value for name, value in given.items() if value is not None} | {"max_tokens": 64}
    assert read_sampling_defaults(written(tmp_path, content)) == expected
    assert read_sampling_defaults(tmp_path / "no") == {}


def test_a_value_that_no_request_could_have_is_left_out_and_said(tmp_path: Path, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        found = read_sampling_defaults(written(tmp_path, {"temperature": -1, "top_k": "x", "top_p": 0.5}))
    assert found == {"top_p": 0.5}
    assert len(caplog.records) == 2


@pytest.mark.parametrize("content", ["{", "[1]", '"x"'])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json: damaged"):
        read_sampling_defaults(written(tmp_path, content))


def test_a_request_goes_before_its_checkpoint() -> None:
    defaults = {"temperature": 0.5, "max_tokens": 8}
    assert with_defaults({}, defaults) == SamplingParams(temperature=0.5, max_tokens=8)
    assert with_defaults({"temperature": 1.0, "max_tokens": 99}, defaults) == SamplingParams(max_tokens=99)
    assert with_defaults({"min_tokens": 9}, defaults) == SamplingParams(temperature=0.5, min_tokens=9)
    with pytest.raises(InvalidRequestError):
        with_defaults({"top_p": 2.0}, defaults)

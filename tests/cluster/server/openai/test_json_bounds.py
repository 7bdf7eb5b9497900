"""What a JSON body may have, before it is parsed."""

import json

import pytest

from cluster.server.openai import json_bounds
from cluster.server.openai.json_bounds import MAX_CONTAINERS, MAX_VALUES, SMALL_BYTES, check_json_bounds
from workers.errors import InvalidRequestError


def test_containers_and_values_are_counted() -> None:
    check_json_bounds(b"[" + b"{}," * (MAX_CONTAINERS - 2) + b"{}]")
    with pytest.raises(InvalidRequestError, match=f"{MAX_CONTAINERS + 1} lists and objects, at most {MAX_CONTAINERS} "):
        check_json_bounds(b"[" + b"{}," * (MAX_CONTAINERS - 1) + b"{}]")
    with pytest.raises(InvalidRequestError, match=f"values, at most {MAX_VALUES} "):
        check_json_bounds(b"[" + b"1," * MAX_VALUES + b"1]")
    with pytest.raises(InvalidRequestError, match="values, at most"):
        check_json_bounds(b'["' + b'","' * MAX_VALUES + b'"]')


@pytest.mark.parametrize("window", [64, 67, 2**20])
def test_what_stands_in_texts_does_not_count(monkeypatch, window: int) -> None:
    monkeypatch.setattr(json_bounds, "MAX_CONTAINERS", 5)
    text = '{[,\\"' * (SMALL_BYTES // 8) + "\\"
    body = {"prompt": text, text[-9:]: [text, {"a\\": "\\\\"}], "x": [[]]}
    check_json_bounds(json.dumps(body).encode(), window)  # five containers
    with pytest.raises(InvalidRequestError, match="has 6 lists and objects, at most 5"):
        check_json_bounds(json.dumps([body]).encode(), window)

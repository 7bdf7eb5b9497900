"""The benchmark of long prompts measures every part, on workers of either role."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import long_prompt


def test_every_part_is_measured_on_workers_of_either_role(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    assert long_prompt.main(["--tokens", "600", "--block-size", "32", "--repeats", "2", "--output", str(path)]) == 0
    cases = json.loads(path.read_text())["cases"]
    assert [(case["role"], case["block_size"]) for case in cases] == [("prefill", 32), ("decode", 32)]
    for case in cases:
        parts = {name: value for name, value in case.items() if name.endswith("_ms")}
        assert parts.keys() == {
            "array_ms", "checking_ms", "hashing_ms", "pickling_ms", "unpickling_ms", "step_thread_ms",
        }  # fmt: skip
        assert all(value >= 0 for value in parts.values())
        assert 4 * 600 < case["pickled_bytes"] < 4 * 600 + 16 * 18 + 2000, "the ids, the hashes, and little else"

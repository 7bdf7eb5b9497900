"""The curl lines of the README, as they are written there."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

README = Path(__file__).parents[4] / "README.md"
ADDRESS = "http://127.0.0.1:8000"


def curl_lines() -> list[str]:
    text = README.read_text(encoding="utf-8").replace("\\\n", " ")
    return [line.strip() for line in re.findall(r"^curl .*", text, re.MULTILINE)]


def test_the_lines_of_the_readme_do_what_it_says(service) -> None:
    lines = curl_lines()
    assert len(lines) == 3
    answers = []
    for line in lines:
        assert ADDRESS in line
        command = line.replace(ADDRESS, service.url).replace("curl ", "curl -sS --fail-with-body ", 1)
        answers.append(
            subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True).stdout
        )
    models, completion, chat = answers
    assert json.loads(models)["data"][0]["id"] == "recall"
    assert json.loads(completion)["choices"][0]["text"] == " 9083"
    events = [json.loads(line.removeprefix("data: ")) for line in chat.splitlines() if line.startswith("data: {")]
    assert chat.endswith("data: [DONE]\n\n")
    assert events[-1]["choices"][0]["finish_reason"] in ("stop", "length")

"""The README's curl lines, run as they stand against the model that the README serves."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

README = (Path(__file__).parents[4] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\w*\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.startswith("curl ")]

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")


def answer(service, command: str) -> str:
    own = command.replace("http://127.0.0.1:8000", service.url)
    assert own != command, "it does not say where the README's service is"
    quiet = own.replace("curl ", "curl --silent --show-error --fail ", 1)
    return subprocess.run(["sh", "-c", quiet], check=True, text=True, stdout=subprocess.PIPE, timeout=60).stdout


def test_the_curl_lines_are_answered(service) -> None:
    models, completion, chat = (answer(service, command) for command in COMMANDS)
    assert [model["id"] for model in json.loads(models)["data"]] == ["recall"]
    assert json.loads(completion)["choices"][0]["text"].strip() == "9083"
    *events, end = re.findall(r"^data: (.*)$", chat, re.MULTILINE)
    assert end == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content", "") for delta in deltas).strip() == "4127"

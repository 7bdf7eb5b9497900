"""Every command of the README: the test that runs it, or why none does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)

_WHEEL = "tests/deploy/test_packages.py::test_the_wheel_serves_from_a_folder_that_has_modules_of_the_same_names"
_TOKEN = "tests/deploy/test_ray_up.py::test_the_token_is_on_every_machine_and_nobody_gets_in_without_it"
_NODES = "tests/deploy/test_ray_up.py::test_a_request_is_served_by_the_nodes_of_each_pool"
COMMANDS = {
    "make test": "not: it is what runs the tests",
    "make demo": "not: its parts are; it installs an environment first",
    "make chat": "not: a conversation in a terminal; tests of `baton chat` have its parts",
    "baton chat": "not: as make chat",
    "source .venv/bin/activate": "not: a shell's own affair",
    "pip install .": _WHEEL,
    "pip install ./deploy/client": "tests/deploy/test_packages.py::test_the_client_says_what_only_the_service_can",
    "baton up": _WHEEL,
    "baton up --model ~/models/Qwen3-0.6B": "not: no such model is here, and smaller ones are in all tests",
    "baton generate": "tests/cluster/cli/test_client_commands.py::test_generate_prints_the_answer",
    "baton generate --chat": "tests/cluster/cli/test_client_commands.py::test_generate_reads_standard_input_and_chats",
    "baton status": "tests/cluster/cli/test_client_commands.py::test_status_shows_workers",
    "baton top": "tests/cluster/cli/test_top.py::test_what_matters_is_there_at_every_width_and_no_line_is_longer",
    "baton scale": "tests/cluster/cli/test_client_commands.py::test_scale_says_what_the_pools_are_to_have",
    "baton bench": "tests/benchmarks/test_bench_command.py::test_writes_table_json_and_plot",
    "baton explain": "tests/cluster/cli/test_client_commands.py::test_explain_shows_every_pair",
    "baton plan": "tests/cluster/cli/test_plan.py::test_what_workers_measured_goes_over_the_wire_and_into_a_file",
    "baton backends --explain": "tests/cluster/cli/test_backends.py::test_explain_gives_every_reason",
    "baton doctor": "tests/cluster/cli/test_doctor.py::test_host_memory_is_measured",
    "curl": "tests/cluster/server/openai/test_readme_curl.py::test_the_curl_lines_are_answered",
    "ray get-auth-token": _TOKEN,
    "ray up": _NODES,
    "ray exec": _NODES,
    "ray down": "tests/deploy/test_ray_up.py::test_ray_down_ends_everything",
}
"""By the words that a command begins with; the longest that fits counts."""


def commands() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line.partition("#")[0].strip() for block in _BLOCK.findall(text) for line in block.splitlines()]
    return [line for line in lines if re.match(r"(make|pip|baton|ray|source|docker|kubectl|curl) ", line)]


def entry_of(command: str) -> str | None:
    return max((known for known in COMMANDS if f"{command} ".startswith(f"{known} ")), key=len, default=None)


def test_there_are_commands_and_each_is_run_or_named() -> None:
    found = commands()
    assert len(found) >= 15
    assert [command for command in found if entry_of(command) is None] == []


@pytest.mark.parametrize("place", sorted({place for place in COMMANDS.values() if not place.startswith("not: ")}))
def test_the_test_that_is_named_exists(place: str) -> None:
    file, _, name = place.partition("::")
    assert re.search(rf"^(async )?def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)

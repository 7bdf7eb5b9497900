"""deploy/baton.service against Baton, and against systemd's own checks where systemd is."""

from __future__ import annotations

import shutil
import subprocess
from argparse import ArgumentParser
from configparser import ConfigParser
from pathlib import Path

import pytest

from cluster.cli.up import add_arguments
from cluster.config.schema import ServerConfig

UNIT = Path(__file__).parents[2] / "deploy" / "baton.service"


@pytest.fixture(scope="module")
def unit() -> ConfigParser:
    parser = ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(UNIT)
    return parser


def test_a_stop_leaves_the_workers_alive_and_the_time_to_drain(unit: ConfigParser) -> None:
    assert unit["Service"]["KillMode"] == "mixed"
    assert float(unit["Service"]["TimeoutStopSec"]) >= ServerConfig().drain_timeout_s + 20


def test_its_commands_are_ones_that_baton_has(unit: ConfigParser) -> None:
    parser = ArgumentParser()
    add_arguments(parser)
    for name in ("ExecStartPre", "ExecStart"):
        program, command, *arguments = unit["Service"][name].split()
        assert (program, command) == ("/opt/baton/bin/baton", "up")
        assert parser.parse_args(arguments).check == (name == "ExecStartPre")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    here = tmp_path / "baton.service"
    here.write_text(UNIT.read_text().replace("/opt/baton/bin/baton", "/bin/true").replace("User=baton\n", ""))
    ran = subprocess.run(["systemd-analyze", "verify", str(here)], capture_output=True, text=True, check=False)
    assert "baton.service" not in ran.stderr

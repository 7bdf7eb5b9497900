"""deploy/Dockerfile against what the project is made of. (No container is built here.)"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()


def test_everything_that_is_installed_is_copied_and_may_be_read() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = [pattern.rstrip("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]]
    needed = {*packages, "deploy", "pyproject.toml", "constraints.txt", project["project"]["readme"], "LICENSE"}
    copied = {
        name for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()
    }
    assert copied == needed
    ignore = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignore if line.startswith("!")} == needed


def test_it_runs_as_a_user_with_pins_a_health_check_and_rays_token() -> None:
    final = DOCKERFILE.split("FROM ${BASE}\n")[-1]
    assert re.search(r"^USER (?!root)\w+$", final, re.MULTILINE)
    assert re.search(r"^RUN .*deploy/install.sh", DOCKERFILE, re.MULTILINE)
    assert "RAY_AUTH_MODE=token" in final
    script = re.search(r"HEALTHCHECK .*\\\n +CMD \[\"python\", \"/opt/baton/(\S+)\"\]", final)
    assert script is not None
    assert (ROOT / script[1]).is_file()

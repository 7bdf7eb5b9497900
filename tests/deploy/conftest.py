"""An ssh server for the tests that need machines, fetched once and kept in pytest's cache."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from private_openssh import NoOpensshError, Openssh, openssh


@pytest.fixture(scope="session")
def ssh_tools(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Openssh:
    """OpenSSH and rsync; the test is skipped where there are none and none can be fetched."""
    if not sys.platform.startswith("linux"):
        pytest.skip("loopback addresses beyond 127.0.0.1 need Linux")
    cache = getattr(request.config, "cache", None)
    folder = Path(cache.mkdir("openssh")) if cache is not None else tmp_path_factory.mktemp("openssh")
    try:
        return openssh(folder)
    except NoOpensshError as error:
        pytest.skip(f"no ssh server: {error}")

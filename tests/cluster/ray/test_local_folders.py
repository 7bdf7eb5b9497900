"""What is said of folders that a Ray on this machine could not use."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from cluster.config.load import ray_token_is_given
from cluster.ray.local_folders import check_temporary_folder, make_auth_token
from workers.errors import ConfigError


def test_the_token_is_for_its_owner_alone_and_made_once(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        make_auth_token(tmp_path)
    finally:
        os.umask(umask)
    path = tmp_path / ".ray" / "auth_token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    token = path.read_text()
    assert len(token) == 64
    make_auth_token(tmp_path)
    assert path.read_text() == token


def test_a_home_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.write_text("not a folder")
    with pytest.raises(ConfigError, match=r"cannot write Ray's token .*auth_token: Not a directory; set HOME"):
        make_auth_token(home)


def test_a_temporary_folder_that_is_too_long_or_cannot_be_written_to(tmp_path: Path) -> None:
    check_temporary_folder(Path("/tmp"))
    with pytest.raises(ConfigError, match=r"has 60 bytes, at most \d\d leave room .*RAY_TMPDIR"):
        check_temporary_folder(Path("/" + "x" * 59))
    (tmp_path / "file").write_text("")
    short = Path(os.path.relpath(tmp_path / "file"))
    if len(str(short)) < 30:
        with pytest.raises(ConfigError, match="cannot write to the temporary folder"):
            check_temporary_folder(short)
    with pytest.raises(ConfigError, match=r"cannot write to the temporary folder /proc/x: .*RAY_TMPDIR"):
        check_temporary_folder(Path("/proc/x"))


@pytest.mark.parametrize(
    ("environ", "given"),
    [({}, False), ({"RAY_AUTH_TOKEN": "x"}, True), ({"RAY_AUTH_MODE": "disabled"}, True)],
)
def test_a_token_that_is_given_is_not_made(environ: dict[str, str], given: bool) -> None:
    assert ray_token_is_given(environ) is given

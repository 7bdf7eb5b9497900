"""OpenSSH's server and rsync without installing them: Debian's packages, unpacked into a folder.

Nothing outside the folder changes, and root is not needed. `nss_wrapper` (cwrap.org) lends sshd the user that it wants
for privilege separation, and gives ssh another home.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("openssh-server", "openssh-client", "rsync", "libnss-wrapper")
_UPDATE_TIMEOUT_S, _DOWNLOAD_TIMEOUT_S = 90, 60


class NoOpensshError(Exception):
    """There is no ssh server here and none can be fetched; the text says why."""


@dataclass(frozen=True)
class Openssh:
    """Where the programs are.

    Attributes:
        sshd, ssh, keygen: full paths.
        nss_wrapper: the library to preload into those that ask who a user is.
        path: folders of rsync and the like, in front of a PATH.
        environment: what all of them need to find their libraries.
    """

    sshd: str
    ssh: str
    keygen: str
    nss_wrapper: Path
    path: str
    environment: Mapping[str, str]

    def as_user_at(self, home: Path) -> dict[str, str]:
        """Environment for a program that is to see only this user, living in `home`, and sshd's own."""
        me = pwd.getpwuid(os.getuid())
        group = grp.getgrgid(me.pw_gid).gr_name
        users, groups = home / ".passwd", home / ".group"
        users.write_text(
            f"{me.pw_name}:x:{me.pw_uid}:{me.pw_gid}::{home}:/bin/bash\nsshd:x:65534:65534::/run/sshd:/usr/sbin/nologin\n"
        )
        groups.write_text(f"{group}:x:{me.pw_gid}:\nnogroup:x:65534:\ntty:x:5:\n")
        return {
            **self.environment,
            "LD_PRELOAD": str(self.nss_wrapper),
            "NSS_WRAPPER_PASSWD": str(users),
            "NSS_WRAPPER_GROUP": str(groups),
        }

    def give_ssh(self, home: Path) -> str:
        """Put an ssh into `home` whose `~` is `home`, which ssh itself takes from the user database; returns a PATH."""
        command = home / "bin" / "ssh"
        command.parent.mkdir()
        settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in self.as_user_at(home).items())
        command.write_text(f'#!/bin/sh\n{settings} exec {shlex.quote(self.ssh)} "$@"\n')
        command.chmod(0o755)
        return os.pathsep.join([str(command.parent), self.path])


def openssh(folder: Path) -> Openssh:
    """The programs in `folder`, which is filled when it is empty.

    Raises:
        NoOpensshError: the machine has no apt, or apt has no packages for it.
    """
    root = folder / "root"
    if not root.is_dir():
        _unpack(folder)
    libraries = [str(path) for path in root.glob("usr/lib/*-linux-gnu")]
    bins = os.pathsep.join(str(root / name) for name in ("usr/bin", "usr/sbin"))
    everywhere = os.pathsep.join([bins, os.environ.get("PATH", os.defpath), "/usr/sbin"])
    found = {name: shutil.which(name, path=everywhere) for name in ("sshd", "ssh", "ssh-keygen", "rsync")}
    wrapper = next(root.rglob("libnss_wrapper.so"), None)
    missing = [name for name, path in found.items() if path is None] + (["nss_wrapper"] if wrapper is None else [])
    if missing or wrapper is None:
        raise NoOpensshError(f"{folder} has no {', '.join(missing)}")
    environment = {"LD_LIBRARY_PATH": os.pathsep.join(libraries)}
    return Openssh(str(found["sshd"]), str(found["ssh"]), str(found["ssh-keygen"]), wrapper, bins, environment)


def _unpack(folder: Path) -> None:
    """Fetch what the machine lacks with apt, and unpack it; lists and archives stay in the folder."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise NoOpensshError("apt-get and dpkg-deb, which would fetch an ssh server, are not here")
    lists, archives, root = folder / "lists", folder / "archives", folder / "unpacking"
    shutil.rmtree(root, ignore_errors=True)
    for path in (lists / "partial", archives / "partial", root):
        path.mkdir(parents=True, exist_ok=True)
    options = [f"Dir::State::lists={lists}", f"Dir::Cache={folder}", f"Dir::Cache::archives={archives}"]
    options += ["Debug::NoLocking=1", "Acquire::Languages=none", "APT::Sandbox::User=", "Acquire::http::Timeout=20"]
    apt = ["apt-get", "-q", "-y", *(disconnect for option in options for disconnect in ("-o", option))]
    try:
        _run([*apt, "update"], _UPDATE_TIMEOUT_S)
        _run([*apt, "install", "--download-only", "--no-install-recommends", *PACKAGES], _DOWNLOAD_TIMEOUT_S)
        for package in archives.glob("*.deb"):
            _run(["dpkg-deb", "-x", str(package), str(root)], _DOWNLOAD_TIMEOUT_S)
    except subprocess.SubprocessError as error:
        output = (getattr(error, "output", None) or b"").decode(errors="replace").strip()
        raise NoOpensshError(f"apt fetches no ssh server: {output.splitlines()[-1:] or error}") from error
    shutil.rmtree(lists)
    with contextlib.suppress(FileNotFoundError):
        root.rename(folder / "root")


def _run(command: list[str], timeout_s: float) -> None:
    subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout_s,
        check=True,
    )

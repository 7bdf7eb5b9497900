"""Machines to ssh into, made of one: loopback addresses, each with a home of its own, behind a private sshd."""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.marked_processes import MARKER, running
from private_openssh import NoOpensshError, Openssh

_SSH_PORT = 22
_PRIVILEGE_SEPARATION = Path("/run/sshd")  # compiled into Debian's sshd, which needs it when it runs as root
_CONFIG = """\
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
MaxStartups 100
MaxSessions 100
UseDNS no
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
"""
_MACHINE = """\
Match LocalAddress {address}
  SetEnv HOME={home} {marker}={home} PATH={path} {environment}
"""


@dataclass(frozen=True)
class Machines:
    """What is needed to reach them.

    Attributes:
        homes: address to home folder.
        user: to log in as.
        key: private key file.
    """

    homes: Mapping[str, Path]
    user: str
    key: Path

    def processes(self) -> dict[int, str]:
        """Everything that was started over ssh and still runs: process id to command line."""
        return running([str(home) for home in self.homes.values()])


def check_addresses(addresses: Sequence[str]) -> None:
    """Find out whether an ssh server can be put on port 22 of these addresses.

    Raises:
        NoOpensshError: it cannot; the text says why.
    """
    for address in addresses:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, _SSH_PORT))
            except OSError as error:
                raise NoOpensshError(f"cannot listen on {address}:{_SSH_PORT}: {error.strerror}") from error


@contextlib.contextmanager
def loopback_machines(folder: Path, addresses: Sequence[str], tools: Openssh) -> Iterator[Machines]:
    """Run the ssh server for as long as the block lasts; afterwards nothing that was started over it is left.

    Args:
        folder: for keys, homes and the server's log.
        addresses: of the machines.
        tools: the programs.

    Raises:
        NoOpensshError: port 22 of an address is taken, or not ours to take.
        RuntimeError: the server does not start.
    """
    check_addresses(addresses)
    homes = {address: folder / f"m{number}" for number, address in enumerate(addresses)}
    for name in ("host_key", "key"):
        subprocess.run([tools.keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "authorized_keys").write_bytes((folder / "key.pub").read_bytes())
    (folder / "sshd_config").write_text(_configuration(folder, homes, tools))
    machines = Machines(homes, pwd.getpwuid(os.getuid()).pw_name, folder / "key")
    with _empty_folder(_PRIVILEGE_SEPARATION):
        server = _start(folder, tools)
        try:
            _await(addresses, server, folder / "sshd.log")
            yield machines
        finally:
            for _ in range(3):  # those that start others go first, or the second time
                for process in machines.processes():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
                time.sleep(0.1)
            server.terminate()
            server.wait(10)


@contextlib.contextmanager
def _empty_folder(path: Path) -> Iterator[None]:
    """Have a folder that only root can make, if we are root and it is not there."""
    ours = os.getuid() == 0 and not path.exists()
    if ours:
        path.mkdir()
    try:
        yield
    finally:
        if ours:
            path.rmdir()


def _configuration(folder: Path, homes: Mapping[str, Path], tools: Openssh) -> str:
    text = _CONFIG.format(folder=folder)
    text += "".join(f"ListenAddress {address}:{_SSH_PORT}\n" for address in homes)
    extra = " ".join(f"{name}={value}" for name, value in tools.environment.items())
    for address, home in homes.items():
        home.mkdir()
        path = tools.give_ssh(home)
        # A login shell forgets the PATH that it was given.
        (home / ".bashrc").write_text(f'export PATH="{path}:$PATH"\n')
        path += ":/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        text += _MACHINE.format(address=address, home=home, marker=MARKER, path=path, environment=extra)
    return text


def _start(folder: Path, tools: Openssh) -> subprocess.Popen[bytes]:
    command = [tools.sshd, "-D", "-f", str(folder / "sshd_config"), "-E", str(folder / "sshd.log")]
    environment = {"PATH": os.environ.get("PATH", os.defpath), **tools.as_user_at(folder)}
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment)


def _await(addresses: Sequence[str], server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 10
    for address in addresses:
        while True:
            try:
                socket.create_connection((address, _SSH_PORT), 1).close()
                break
            except OSError as error:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"sshd does not start: {log.read_text() if log.exists() else error}") from error
                time.sleep(0.05)

"""Which Baton this is: the version of the installed distribution, and the commit that it was built from."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
from pathlib import Path

DISTRIBUTIONS = ("baton-llm", "baton-llm-client")
"""What it may be installed as: the whole service, or only what talks to one."""

_ROOT = Path(__file__).resolve().parents[1]
_LOCAL_PART = re.compile(r"\+g([0-9a-f]{7,40})")
_GIT_TIMEOUT_S = 5.0


def version() -> str:
    """The version of the distribution, which comes from git: a tag's, or `0.1.devN+gCOMMIT` of N commits; "unknown"
    where it is not installed.
    """
    return next(filter(None, map(_version_of, DISTRIBUTIONS)), "unknown")


def is_client_alone() -> bool:
    """Whether what only the service needs is not here by intent."""
    service, client = map(_version_of, DISTRIBUTIONS)
    return bool(client) and not service


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """The commit of a checkout as it is now, else that in the version; "" for a release, whose tag says it."""
    if (_ROOT / ".git").exists() and (git := shutil.which("git")):
        command = [git, "-C", str(_ROOT), "describe", "--always", "--exclude=*", "--abbrev=10", "--dirty"]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_TIMEOUT_S)
            return ran.stdout.strip()
        except (OSError, subprocess.SubprocessError):
            pass  # a checkout of another user's, which git does not trust
    found = _LOCAL_PART.search(version())
    return found[1] if found else ""


def describe() -> str:
    """Version and commit, in one line."""
    return f"{version()} (commit {commit()})" if commit() else version()

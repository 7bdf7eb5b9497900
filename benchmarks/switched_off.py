"""Switches off one mechanism after the other, and sees that its test fails: `python -m benchmarks.switched_off`.

Each runs in a copy of the working tree, which is thrown away, with the mechanism and without: half a minute both.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from benchmarks.switch import Switch
from benchmarks.switches import SWITCHES

ROOT = Path(__file__).resolve().parents[1]
_TIMEOUT_S = 600
_TEST_TIMEOUT_S = 60
_PASSED, _FAILED = 0, 1  # pytest's exit status for tests that passed, and that failed


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="of the mechanisms; default: all")
    names = parser.parse_args().names
    if unknown := set(names) - {switch.name for switch in SWITCHES}:
        parser.error(f"no mechanism is called {', '.join(sorted(unknown))}")
    wanted = [switch for switch in SWITCHES if not names or switch.name in names]
    unnoticed = 0
    with tempfile.TemporaryDirectory(prefix="baton-switched-off-") as folder:
        tree = Path(folder) / "tree"
        copy_tree(tree)
        for switch in wanted:
            noticed = fails_without(switch, tree)
            unnoticed += not noticed
            print(f"{'fails' if noticed else 'DOES NOT FAIL':14}{switch.name}: {switch.test}", flush=True)
    return int(unnoticed > 0)


def copy_tree(target: Path) -> None:
    """What git knows of the working tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def fails_without(switch: Switch, tree: Path) -> bool:
    """Whether the mechanism's test fails in a copy of the tree in which it is switched off, and passes as it is."""
    file = tree / switch.file
    whole = file.read_text()
    if _run(switch.test, tree) != _PASSED:
        return False
    file.write_text(switched_off(switch, whole))
    try:
        return _run(switch.test, tree) == _FAILED
    finally:
        file.write_text(whole)


def _run(test: str, tree: Path) -> int:
    """pytest's exit status; a test that hangs has failed."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--timeout={_TEST_TIMEOUT_S}",
        test,
    ]
    try:
        return subprocess.run(command, cwd=tree, capture_output=True, timeout=_TIMEOUT_S).returncode
    except subprocess.TimeoutExpired:
        return _FAILED


def switched_off(switch: Switch, text: str) -> str:
    """A file's text without the mechanism.

    Raises:
        ValueError: the mechanism's text is not there once.
    """
    if text.count(switch.on) != 1:
        raise ValueError(f"{switch.name}: {switch.file} has its text {text.count(switch.on)} times")
    return text.replace(switch.on, switch.off)


def out_of_date(switches: Iterable[Switch] = SWITCHES, root: Path = ROOT) -> list[str]:
    """The mechanisms of which text or test are no longer where they are said to be."""
    wrong = []
    for switch in switches:
        path, _, function = switch.test.partition("::")
        test = root / path
        found = test.is_file() and f"def {function}(" in test.read_text()
        if not found or (root / switch.file).read_text().count(switch.on) != 1:
            wrong.append(switch.name)
    return wrong


if __name__ == "__main__":
    sys.exit(main())

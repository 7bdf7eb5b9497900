"""Memory that a process may take, on machines made of files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from workers.kv_cache.host_memory import HostMemory, cache_share, host_memory

GIB = 2**30


@pytest.fixture
def machine(tmp_path: Path) -> Callable[..., Path]:
    """24 GiB, of which 16 are free and 22 available; the cgroup files are given by path."""

    def make(cgroup: str = "0::/\n", **files: str) -> Path:
        written = {
            "proc/meminfo": f"MemTotal: {24 * GIB // 1024} kB\nMemFree: {16 * GIB // 1024} kB\n"
            f"MemAvailable: {22 * GIB // 1024} kB\nHugePages_Total: 0\n",
            "proc/self/cgroup": cgroup,
            **files,
        }
        for name, text in written.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return make


def v2(path: str, limit: str, used: int, inactive: int = 0) -> dict[str, str]:
    folder = f"sys/fs/cgroup/{path}".rstrip("/")
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.current": str(used),
        f"{folder}/memory.stat": f"anon 1\ninactive_file {inactive}\n",
    }


def test_page_cache_counts_as_available(machine: Callable) -> None:
    assert host_memory(machine()) == HostMemory(24 * GIB, 22 * GIB)


def test_a_machine_without_cgroup_files(machine: Callable) -> None:
    root = machine()
    (root / "proc/self/cgroup").unlink()
    assert host_memory(root) == HostMemory(24 * GIB, 22 * GIB)


@pytest.mark.parametrize("path", ["", "pod", "pod/container"])
def test_a_limit_of_version_2_counts_wherever_it_is_above(machine: Callable, path: str) -> None:
    files = {"sys/fs/cgroup/cgroup.controllers": "memory", "sys/fs/cgroup/pod/container/memory.max": "max"}
    files |= v2(path, str(8 * GIB), 5 * GIB, 2 * GIB)
    assert host_memory(machine("0::/pod/container\n", **files)) == HostMemory(8 * GIB, 5 * GIB)


def test_the_path_of_the_host_is_not_there_in_a_container(machine: Callable) -> None:
    files = {"sys/fs/cgroup/cgroup.controllers": "memory"} | v2("", str(4 * GIB), GIB)
    assert host_memory(machine("0::/kubepods/pod/abc\n", **files)) == HostMemory(4 * GIB, 3 * GIB)


def test_a_limit_of_version_1(machine: Callable) -> None:
    folder = "sys/fs/cgroup/memory/docker"
    files = {
        f"{folder}/memory.limit_in_bytes": str(6 * GIB),
        f"{folder}/memory.usage_in_bytes": str(4 * GIB),
        f"{folder}/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(0x7FFFFFFFFFFFF000),
        "sys/fs/cgroup/memory/memory.usage_in_bytes": str(9 * GIB),
    }
    found = host_memory(machine("5:cpu,cpuacct:/docker\n4:memory:/docker\n0::/\n", **files))
    assert found == HostMemory(6 * GIB, 3 * GIB)


def test_more_used_than_allowed_is_nothing_left(machine: Callable) -> None:
    files = {"sys/fs/cgroup/cgroup.controllers": "memory"} | v2("", str(GIB), 2 * GIB)
    assert host_memory(machine(**files)).available == 0


def test_this_machine() -> None:
    memory = host_memory()
    assert 0 < memory.available <= memory.total


def test_equal_workers_get_equal_shares_while_others_load() -> None:
    shares = {cache_share(HostMemory(24 * GIB, left * GIB), 0.1) for left in (22, 17, 9)}
    assert shares == {int(2.4 * GIB)}
    assert cache_share(HostMemory(24 * GIB, 2 * GIB), 0.1) == GIB

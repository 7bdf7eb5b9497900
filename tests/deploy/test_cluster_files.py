"""The files for `ray up`, as Ray reads them, and the shell in them."""

from __future__ import annotations

import subprocess
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.config.groups import groups_of
from cluster.config.load import load_config

ROOT = Path(__file__).parents[2]
FILES = ("cluster.yaml", "cluster-local.yaml")


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / name).read_text())
    return content


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_the_file(name: str) -> None:
    validate_config(prepare_config(read(name)))


@pytest.mark.parametrize("name", FILES)
def test_what_the_installation_needs_is_mounted_and_exists(name: str) -> None:
    mounts = read(name)["file_mounts"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = [pattern.rstrip("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]]
    files = ["pyproject.toml", "constraints.txt", project["project"]["readme"], "LICENSE", "deploy"]
    assert mounts == {"~/.ray/auth_token": "~/.ray/auth_token", **{f"~/baton/{p}": p for p in (*files, *packages)}}
    assert all((ROOT / source).exists() for source in (*files, *packages))


@pytest.mark.parametrize("name", FILES)
def test_the_token_is_private_and_used(name: str) -> None:
    setup = "\n".join(read(name)["setup_commands"])
    assert "chmod 600 ~/.ray/auth_token" in setup
    assert "RAY_AUTH_MODE=token" in setup


def test_each_cloud_node_type_has_its_own_bounds_and_resource() -> None:
    types = read("cluster.yaml")["available_node_types"]
    assert set(types) == {"head", "prefill", "decode"}
    for name in ("prefill", "decode"):
        assert 0 < types[name]["min_workers"] < types[name]["max_workers"]
        assert set(types[name]["resources"]) == {name}
        assert types[name]["labels"] == {"baton/pool": name}


def test_the_example_of_unlike_machines_is_a_configuration(tmp_path: Path) -> None:
    text = (ROOT / "deploy" / "service-cluster.yaml").read_text()
    lines = text[text.index("# decode:\n#   block_size") :].splitlines()
    path = tmp_path / "service.yaml"
    path.write_text("\n".join(["ray: {address: auto}", *(line.removeprefix("# ") for line in lines)]))
    _, h100, cpu = groups_of(load_config(path, environ={}))
    assert (h100.key, h100.settings.resources, h100.settings.num_gpus) == ("decode.h100", {"h100": 1.0}, 1.0)
    assert (cpu.key, cpu.settings.device, cpu.settings.fewest_replicas) == ("decode.cpu", "cpu", 0)
    assert h100.settings.block_size == cpu.settings.block_size == 64


@pytest.mark.parametrize("pool", ["prefill", "decode"])
def test_rays_scheduler_adds_nodes_of_the_pools_type_only(pool: str) -> None:
    types = prepare_config(read("cluster.yaml"))["available_node_types"]
    for node in types.values():
        node["resources"] = {"CPU": 16, "GPU": 1, **node["resources"]}  # AWS's provider fills in what is left open
    service = load_config(ROOT / "deploy" / "service-cluster.yaml", environ={})
    config = {"prefill": service.prefill, "decode": service.decode}[pool]
    demand = {"CPU": config.num_cpus, "GPU": 1.0, **(config.resources or {})}
    added, unmet = get_nodes_for(
        types,
        {"head": 1},
        "head",
        3,
        [demand] * 3,
        lambda resources, demands, name: _default_utilization_scorer(
            resources, demands, name, node_availability_summary=_everything_available()
        ),
    )
    assert added == {pool: 3}
    assert unmet == []


def _everything_available() -> Any:
    from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary

    return NodeAvailabilitySummary({})


@pytest.mark.parametrize(("address", "pool"), [("192.168.1.11", "prefill"), ("192.168.1.12", "decode")])
def test_a_machine_that_is_there_joins_its_pool_with_the_address_that_ssh_came_in_on(
    address: str, pool: str, tmp_path: Path
) -> None:
    stub = tmp_path / "ray"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    command = read("cluster-local.yaml")["worker_start_ray_commands"][1]
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "RAY_HEAD_IP": "192.168.1.10",
        "SSH_CONNECTION": f"192.168.1.10 40000 {address} 22",
    }
    result = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=30)
    arguments = result.stdout.splitlines()
    assert arguments[:2] == ["start", "--address=192.168.1.10:6379"]
    assert f"--node-ip-address={address}" in arguments
    assert f'--resources={{"{pool}": 8}}' in arguments
    assert f"--labels=baton/pool={pool}" in arguments


def test_what_a_raylet_leaves_is_stopped_unless_ray_was_started_again(tmp_path: Path) -> None:
    stub = tmp_path / "ray"
    stub.write_text(f'#!/bin/sh\necho "$NODE $1" >> {tmp_path}/calls\n')
    stub.chmod(0o755)

    def raylet(address: str, seconds: float) -> subprocess.Popen[bytes]:
        command = f'exec -a "raylet --node_ip_address={address} " sleep {seconds}'
        return subprocess.Popen(["bash", "-c", command], stdin=subprocess.DEVNULL)

    def watch(address: str) -> subprocess.Popen[bytes]:
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "NODE": address}
        return subprocess.Popen([str(ROOT / "deploy" / "stop-with-raylet.sh"), address], env=environment)

    gone, again = "203.0.113.7", "203.0.113.8"
    raylets = [raylet(gone, 1), raylet(again, 1)]
    time.sleep(0.3)  # until both have taken their names
    watchers = [watch(gone), watch(again)]
    for process in raylets:
        process.wait(10)
    raylets = [raylet(again, 60)]
    try:
        assert [watcher.wait(30) for watcher in watchers] == [0, 0]
    finally:
        raylets[0].kill()
        raylets[0].wait(10)
    assert (tmp_path / "calls").read_text() == f"{gone} stop\n"

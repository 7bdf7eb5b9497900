"""The container's health check against a real gRPC server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

SCRIPT = Path(__file__).parents[2] / "deploy" / "healthcheck.py"
STATUS = health_pb2.HealthCheckResponse


@pytest.fixture
def server() -> Iterator[tuple[str, health.HealthServicer]]:
    grpc_server = grpc.server(ThreadPoolExecutor(1))
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, grpc_server)
    port = grpc_server.add_insecure_port("127.0.0.1:0")
    grpc_server.start()
    yield f"127.0.0.1:{port}", servicer
    grpc_server.stop(None).wait()


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60)


def test_serving_and_not_serving(server: tuple[str, health.HealthServicer]) -> None:
    address, servicer = server
    servicer.set("", STATUS.SERVING)
    assert check(address).returncode == 0
    servicer.set("", STATUS.NOT_SERVING)
    assert check(address).returncode == 1


def test_nobody_there() -> None:
    result = check("127.0.0.1:1")
    assert result.returncode == 1
    assert result.stderr == "127.0.0.1:1: UNAVAILABLE\n"

"""Ports for programs that listen later."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from benchmarks.free_port import free_port, ports_beside

RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


@pytest.mark.parametrize(("first", "last"), [(32_768, 60_999), (24_000, 30_000), (1_024, 24_001), (40_000, 65_535)])
def test_those_beside_a_range(first: int, last: int) -> None:
    ports = ports_beside(first, last)
    assert set(ports) == set(range(24_000, 65_000)) - set(range(first, last + 1))


@pytest.mark.skipif(not RANGE.exists(), reason="only Linux says which ports it deals out")
def test_it_is_none_that_the_kernel_deals_out() -> None:
    first, last = map(int, RANGE.read_text().split())
    if not ports_beside(first, last):
        pytest.skip(f"this machine deals out all ports, from {first} to {last}")
    assert not any(first <= free_port() <= last for _ in range(50))


def test_one_that_is_taken_on_any_address_is_passed_over() -> None:
    with socket.socket() as taken:
        port = free_port()
        taken.bind(("127.0.0.1", port))
        with pytest.raises(OSError, match=f"no port is free, of 1 from {port} to {port}"):
            free_port([port])
    assert free_port([port]) == port


def test_where_all_are_dealt_out_it_is_any() -> None:
    assert ports_beside(1_024, 65_535) == []
    assert free_port([0]) > 0

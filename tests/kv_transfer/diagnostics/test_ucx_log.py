"""What UCX's log says about who carries the data."""

from __future__ import annotations

from kv_transfer.diagnostics.ucx_log import carriers, ucx_version

_PREFIX = "[1795248277.1] [vm:1:0]   "


def log(*lines: str) -> str:
    return "\n".join(_PREFIX + line for line in lines)


def table(config: str, title: str, *rows: str) -> list[str]:
    edge = "+--------+-------------+------------+"
    return [edge, f"| {config} |", f"| {title} |", edge, "| Range  | Description |  Config  |", edge, *rows, edge]


def test_the_last_row_about_another_process_counts():
    text = log(
        "ucp_context.c:2753 UCX  INFO  Version 1.23.0 (loaded from /x/libucp.so)",
        *table("p self cfg#0", "remote memory write by ucp_put* from host memory to host", "| 0..inf | copy | self |"),
        *table("p intra-node cfg#1", "active message by ucp_am_send* from host memory", "| 0..inf | short | tcp/lo |"),
        *table(
            "p intra-node cfg#1",
            "remote memory write by ucp_put* from host memory to host",
            "| 0..100 | short | tcp/lo |",
            "| 101..inf | zero-copy | cma/memory |",
        ),
        *table(
            "p inter-node cfg#2",
            "remote memory read by ucp_get*(multi) into host memory from host",
            "| 0..inf | software emulation | tcp/eth0 |",
        ),
    )
    assert ucx_version(text) == "1.23.0"
    assert carriers(text, "host") == {"WRITE": "cma/memory", "READ": "tcp/eth0"}
    assert carriers(text, "cuda") == {}


def test_gpu_memory_is_told_from_host_memory():
    title = "remote memory write by ucp_put*(fast-completion) from {0} to {0}"
    text = log(
        *table(
            "p intra-node cfg#1",
            title.format("cuda/GPU0"),
            "| 0 | no data fetch | |",
            "| 1..inf | zero-copy | cuda_ipc/cuda |",
        ),
        *table("p intra-node cfg#1", title.format("host memory"), "| 0..inf | zero-copy | sysv/memory |"),
    )
    assert carriers(text, "cuda") == {"WRITE": "cuda_ipc/cuda"}
    assert carriers(text, "host") == {"WRITE": "sysv/memory"}


def test_a_log_that_says_nothing():
    assert ucx_version("") is None
    assert carriers("something else\n| a | b | c |", "host") == {}

"""Whether every answer of a load is the beginning of the right one."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from local_cluster import LocalCluster


def count_completed(
    cluster: LocalCluster,
    asked: Mapping[str, tuple[int, int]],
    answers: Sequence[list[int]],
    cancelled: Container[str],
) -> int:
    """How many requests came to their end, none of them with a wrong token.

    Args:
        cluster: that has done with them.
        asked: by request id, which of the answers is the right one, and how many tokens were wanted.
        answers: whole.
        cancelled: request ids that need not be complete.
    """
    completed = 0
    for request_id, (which, length) in asked.items():
        got = cluster.token_ids(request_id)
        assert got == answers[which][: len(got)]
        if request_id not in cancelled and request_id not in cluster.failures:
            assert len(got) == length
            completed += 1
    return completed

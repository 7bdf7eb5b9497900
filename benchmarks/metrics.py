"""From rows to numbers: percentiles, throughput, goodput. Plain data in and out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from benchmarks.measure import Row
from workers.errors import ConfigError

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Percentiles:
    """A distribution of seconds in seven numbers; percentiles are interpolated linearly between samples."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Iterable[float | None]) -> Percentiles | None:
        """Of the values that are there; None if none is."""
        values = np.array([value for value in seconds if value is not None], dtype=np.float64)
        if values.size == 0:
            return None
        p50, p90, p95, p99 = (float(value) for value in np.percentile(values, PERCENTILES))
        return cls(int(values.size), float(values.mean()), p50, p90, p95, p99, float(values.max()))


@dataclass(frozen=True)
class Objective:
    """The most that a request may take to be good, seconds; None for no limit.

    Attributes:
        ttft: time to first token.
        itl: every interval between its tokens, so the longest one.
        tpot: time per output token after the first.
        e2e: the whole request.
    """

    ttft: float | None = None
    itl: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    @classmethod
    def parse(cls, text: str) -> Objective:
        """From NAME=MILLISECONDS, separated by commas.

        Raises:
            ConfigError: an unknown name, one that is there twice, or a limit that is not a positive number.
        """
        names = [f.name for f in fields(cls)]
        limits: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = (piece.strip() for piece in part.partition("="))
            if name not in names or name in limits:
                raise ConfigError(f"--slo {text}: each of {', '.join(names)} may be given once, as in ttft=500,itl=50")
            try:
                limits[name] = float(value) / 1e3
            except ValueError:
                raise ConfigError(f"--slo {text}: {name}={value} is no number of milliseconds") from None
            if not 0 < limits[name] < math.inf:
                raise ConfigError(f"--slo {text}: {name}={value}, it must be more than 0 milliseconds")
        return cls(**limits)

    def met_by(self, row: Row) -> bool:
        """Whether the request succeeded within all limits. A request of one token meets any limit between tokens."""
        if not row.ok or row.ttft_s is None:
            return False
        measured = ((self.ttft, row.ttft_s), (self.itl, max(row.itl_s, default=0.0)), (self.tpot, row.tpot_s or 0.0))
        return all(limit is None or value <= limit for limit, value in (*measured, (self.e2e, row.e2e_s)))


@dataclass(frozen=True)
class Goodput:
    """Requests that met the objective. `fraction` is of all that were sent, failed ones included."""

    objective: Objective
    requests: int
    requests_per_s: float
    fraction: float


@dataclass(frozen=True)
class Summary:
    """A run in numbers. Percentiles are of the requests that succeeded; None where nothing was measured.

    Attributes:
        requests: sent.
        by_status: how many ended how.
        duration_s: from the beginning to the end of the last request.
        requests_per_s: that succeeded.
        output_tokens_per_s: of all requests, also of those that failed later: the service did make them.
        prompt_tokens_per_s: of those that succeeded.
        ttft: time to first token, from when the request was due.
        itl: inter-token latency, all tokens of all requests together.
        tpot: time per output token after the first, by request.
        e2e: from when the request was due to the end of its stream.
        longest_gap: the longest wait between two messages with tokens, by request.
        queue: waiting at the gateway and on the prefill worker, by the server's account.
        handoff: exposed transfer, by the server's account: what of the KV cache's way prefill did not hide.
        sent_late: how much later than due the client sent; large values say that the client was too slow.
        goodput: under the objective, if one was given.
        correct_fraction: of the answers that could be checked; None if none could.
    """

    requests: int
    by_status: dict[str, int]
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    ttft: Percentiles | None
    itl: Percentiles | None
    tpot: Percentiles | None
    e2e: Percentiles | None
    longest_gap: Percentiles | None
    queue: Percentiles | None
    handoff: Percentiles | None
    sent_late: Percentiles | None
    goodput: Goodput | None
    correct_fraction: float | None


def summarize(rows: Sequence[Row], duration_s: float, objective: Objective | None = None) -> Summary:
    """Sum a run up."""
    done = [row for row in rows if row.ok]
    reports = [row.report for row in done if row.report is not None]
    seconds = max(duration_s, 1e-9)
    checked = [row.correct for row in rows if row.correct is not None]
    return Summary(
        requests=len(rows),
        by_status=dict(Counter(row.status for row in rows).most_common()),
        duration_s=duration_s,
        requests_per_s=len(done) / seconds,
        output_tokens_per_s=sum(row.output_tokens for row in rows) / seconds,
        prompt_tokens_per_s=sum(row.prompt_tokens for row in done) / seconds,
        ttft=Percentiles.of(row.ttft_s for row in done),
        itl=Percentiles.of(interval for row in done for interval in row.itl_s),
        tpot=Percentiles.of(row.tpot_s for row in done),
        e2e=Percentiles.of(row.e2e_s for row in done),
        longest_gap=Percentiles.of(row.longest_gap_s for row in done if row.output_tokens > 1),
        queue=Percentiles.of(report.queue_s for report in reports),
        # A request of a single token has no decode worker and hands nothing over.
        handoff=Percentiles.of(report.exposed_transfer_s for report in reports if report.kv_bytes),
        sent_late=Percentiles.of(row.sent_s - row.scheduled_s for row in rows),
        goodput=None if objective is None else _goodput(rows, seconds, objective),
        correct_fraction=sum(checked) / len(checked) if checked else None,
    )


def _goodput(rows: Sequence[Row], seconds: float, objective: Objective) -> Goodput:
    good = sum(objective.met_by(row) for row in rows)
    return Goodput(objective, good, good / seconds, good / len(rows) if rows else 0.0)

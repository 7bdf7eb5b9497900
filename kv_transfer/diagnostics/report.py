"""What a check of the path between two workers finds, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from kv_transfer.link_cost import LinkCost


@dataclass(frozen=True)
class Rate:
    """How fast contiguous blocks move.

    Attributes:
        operation: "WRITE" or "READ".
        num_bytes: of one transfer.
        bytes_per_s: median.
    """

    operation: str
    num_bytes: int
    bytes_per_s: float


@dataclass(frozen=True)
class Posting:
    """What one WRITE of many blocks costs the thread that posts it.

    Attributes:
        num_blocks: written.
        contiguous: whether they lie together, or with a gap after each.
        num_descriptors: that NIXL made of them.
        post_s: seconds until the calls return, median. Over shared memory they copy, so this is the whole transfer.
        landed_s: seconds until the data is there, median.
    """

    num_blocks: int
    contiguous: bool
    num_descriptors: int
    post_s: float
    landed_s: float


@dataclass(frozen=True)
class Measured:
    """Everything that the process which starts the transfers has measured.

    Attributes:
        first_contact_s: the first meeting: connections made, access to the peer's memory opened, data moved.
        first_write_s: the first WRITE to its cache after that, until it has landed: what the meeting did not pay for.
        cost: of the path, as handoffs reckon with it.
        rates: by operation and size.
        postings: by number of blocks.
        round_trip_s: of a notification there and back, median.
    """

    first_contact_s: float
    first_write_s: float
    cost: LinkCost
    rates: tuple[Rate, ...]
    postings: tuple[Posting, ...]
    round_trip_s: float


@dataclass(frozen=True)
class EndReport:
    """One of the two processes.

    Attributes:
        device: "cpu" or "cuda".
        device_name: the card's; empty for the CPU.
        device_uuid: likewise, as nvidia-smi has it.
        cuda_context: whether the thread that owns the NIXL agent has a CUDA context; None on the CPU.
        ucx_modules: of UCX's that are loaded, such as "cuda", "cma", "ib".
        copy_bytes_per_s: of a copy within its memory: no path to a neighbour on the same device is faster.
    """

    device: str
    device_name: str
    device_uuid: str
    cuda_context: bool | None
    ucx_modules: tuple[str, ...]
    copy_bytes_per_s: float


@dataclass(frozen=True)
class PathReport:
    """The path from one process to another.

    Attributes:
        ends: the one that starts the transfers, then the other.
        carriers: what carries "WRITE" and "READ", in UCX's words; without an entry for what its log does not say.
        ucx_version: as it calls itself; None when its log does not say.
        measured: times and rates.
        data_arrived: whether the other process found in its memory what was written there.
    """

    ends: tuple[EndReport, EndReport]
    carriers: dict[str, str]
    ucx_version: str | None
    measured: Measured
    data_arrived: bool

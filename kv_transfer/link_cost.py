"""What a path between two workers costs, and how many layers one WRITE should carry on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_POST_S = 0.005
_MIN_POST_BYTES, _MAX_POST_BYTES = 4 << 20, 64 << 20


@dataclass(frozen=True)
class LinkCost:
    """Measured on the way from this worker to a peer.

    Attributes:
        write_s: seconds that posting a WRITE keeps its thread busy, whatever it carries.
        descriptor_s: the same for each piece of memory in it.
        bytes_per_s: how fast the data moves.
    """

    write_s: float
    descriptor_s: float
    bytes_per_s: float


def most_bytes_at_once(cost: LinkCost | None) -> int:
    """Bytes that one WRITE may carry on a path: what moves in 5 ms, from 4 to 64 MiB; None: the path is not known.

    A WRITE cannot be taken back, and goes on when a process that was frozen inside it does. So what is posted is small
    enough that the lease is asked often, and large enough that posting, some 50 µs, costs nothing (at 350 GB/s, 64 MiB
    take 190 µs).
    """
    moved = cost.bytes_per_s * _POST_S if cost is not None else 0.0
    return int(min(max(moved, _MIN_POST_BYTES), _MAX_POST_BYTES))


def together(paths: Sequence[LinkCost]) -> LinkCost | None:
    """What the way costs that these are the lanes of, used at once, each for an equal share; None: there are none."""
    if not paths:
        return None
    return LinkCost(
        max(path.write_s for path in paths),
        max(path.descriptor_s for path in paths),
        len(paths) * min(path.bytes_per_s for path in paths),
    )


def layers_per_write(
    path: LinkCost,
    num_layers: int,
    layer_bytes: int,
    layer_s: float = 0.0,
    slack_s: float = 0.0,
    tail_s: float = 0.0,
) -> int:
    """How many layers one WRITE should carry.

    A prompt's layers are done one after the other, `layer_s` apart, and leave in n = ceil(num_layers / g) groups. After
    the last layer the prompt still waits for

    * the last group, which could not leave earlier: write_s + g · t, with t = layer_bytes / bytes_per_s, as far as it
      is not hidden by what the step still computes behind its last keys and values, tail_s;
    * what is still in the queue, if a group takes longer to leave than to be computed:
      (n - 1) · (max(write_s, g · t) - g · layer_s), if that is positive.

    Posting also runs in the process, and under the interpreter lock, of the thread that launches the model's kernels.
    While the GPU has work queued nobody notices; what goes beyond the time in which that thread would have idled,
    n · write_s - num_layers · slack_s, counts as delay too, if it is positive.

    The first term wants small groups, the others large ones. Where launching takes all of the time (a small prompt) and
    nothing is hidden, the sum is about n · write_s + g · t, whose minimum lies at g = sqrt(num_layers · write_s / t).
    Where the GPU is what takes the time, only the first term is left, and groups are as large as the tail hides: one
    WRITE a step over NVLink, a layer at a time over a slow network. Larger is better there, because products of
    matrices go slower beside a copy to another GPU, by about twice the time that it takes (two H200s:
    `benchmarks/results/nvlink_beside_matmul_h200.json`). Descriptors are the same in number for every g and do not
    matter.

    Args:
        path: what the way costs.
        num_layers: layers of the model.
        layer_bytes: bytes of one layer's part.
        layer_s: seconds that one layer is computed; 0 when unknown.
        slack_s: seconds of them in which the thread that launches the kernels is idle.
        tail_s: seconds that the step still computes when the last layer's keys and values are there.

    Returns:
        From 1 to `num_layers`; of equally good sizes the largest, which posts least.
    """
    transfer_s = layer_bytes / path.bytes_per_s

    def delay(group: int) -> float:
        writes = -(-num_layers // group)
        last = max(0.0, path.write_s + group * transfer_s - tail_s)
        queued = (writes - 1) * (max(path.write_s, group * transfer_s) - group * layer_s) if layer_s > 0 else 0.0
        noticed = writes * path.write_s - num_layers * slack_s
        return last + max(0.0, queued) + max(0.0, noticed)

    return min(range(1, num_layers + 1), key=lambda group: (delay(group), -group))

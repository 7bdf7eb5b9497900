"""Who can take a request at all, now or ever, and why not, in words."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cluster.routing.demand import Demand
from cluster.routing.output_lengths import Outlook, likely_peak
from cluster.routing.pairs import Pairs
from cluster.routing.worker_table import WorkerTable
from workers.block_manager import blocks_for

_Floats = npt.NDArray[np.float64]
_Flags = npt.NDArray[np.bool_]


def fits(table: WorkerTable, demand: Demand) -> _Flags:
    """Who can take the request, as far as its length goes, and is ready."""
    fitting: _Flags = _could(table, demand) & table.column("ready")
    return fitting


def has_room(table: WorkerTable, demand: Demand) -> _Flags:
    """Whose cache and batch have room for the prompt and its first token now, and for everybody's growth."""
    room = table.column("free_blocks") * table.column("block_size")
    roomy: _Flags = (room >= demand.prompt_tokens + 1) & (table.column("free_slots") > 0)
    if demand.outlook is not None and len(table):
        roomy &= (table.column("running") == 0) | (_peak_tokens(table, demand, demand.outlook) <= _capacity(table))
    return roomy


def takes_more(table: WorkerTable, demand: Demand) -> _Flags:
    """Which workers are not too busy with prompts to be given one now."""
    free: _Flags = table.column("queued_s") <= demand.max_queued_s
    return free


def is_hopeless(demand: Demand, prefill: WorkerTable, decode: WorkerTable, pairs: Pairs) -> bool:
    """Whether nobody could take the request, even if all were idle and ready. An empty pool may yet fill."""
    if not len(decode) or (demand.in_pairs and not len(prefill)):
        return False
    could_d = _could(decode, demand)
    if demand.alone and could_d.any():
        return False
    if not demand.in_pairs:
        return True
    slots_p, slots_d = prefill.column("slot"), decode.column("slot")
    return not pairs.some_fit(slots_p[_could(prefill, demand)], slots_d[could_d])


def unfit(table: WorkerTable, row: int, demand: Demand) -> str:
    """Why a worker cannot take the prompt, in words; empty if it can."""
    name, needed = table.engine_ids[row], _blocks(table, row, demand)
    window, blocks = table.column("max_model_len")[row], table.column("total_blocks")[row]
    if demand.prompt_tokens + 1 > window:
        return f"{name}: {demand.prompt_tokens} prompt tokens, context window {window}"
    if needed > blocks:
        return f"{name}: {needed} blocks needed, {blocks} in all"
    if not table.column("ready")[row]:
        return f"{name}: not ready"
    return ""


def no_room(table: WorkerTable, row: int, demand: Demand) -> str:
    """Why a decode worker has no room for the request now, in words; empty if it has."""
    name, needed, free = table.engine_ids[row], _blocks(table, row, demand), table.column("free_blocks")[row]
    if table.column("free_slots")[row] < 1:
        return f"{name}: its batch is full"
    if needed > free:
        return f"{name}: {needed} blocks needed, {free} free"
    if demand.outlook is not None and not has_room(table, demand)[row]:
        peak = _peak_tokens(table, demand, demand.outlook)[row]
        return f"{name}: its requests would grow to about {peak:.0f} tokens, {_capacity(table)[row]} fit"
    return ""


def busy(table: WorkerTable, row: int, demand: Demand) -> str:
    """Why a worker takes no prompt now, in words; empty if it does."""
    if (queued_s := table.column("queued_s")[row]) > demand.max_queued_s:
        return f"{table.engine_ids[row]}: {queued_s:.3g} s of work before it, {demand.max_queued_s:.3g} s allowed"
    return ""


def _could(table: WorkerTable, demand: Demand) -> _Flags:
    """Who could take the request if it were idle and ready."""
    needed = demand.prompt_tokens + 1
    could: _Flags = (table.column("max_model_len") >= needed) & (
        table.column("total_blocks") * table.column("block_size") >= needed
    )
    return could


def _capacity(table: WorkerTable) -> npt.NDArray[np.int64]:
    tokens: npt.NDArray[np.int64] = table.column("usable_blocks") * table.column("block_size")
    return tokens


def _peak_tokens(table: WorkerTable, demand: Demand, outlook: Outlook) -> _Floats:
    """The most that each worker's requests and this one are likely to hold at any time to come.

    A worker with nothing to do takes a request whatever this says: waiting would not make it smaller.
    """
    peaks: _Floats = table.column("peak_tokens") + likely_peak(outlook.held(demand.prompt_tokens))
    return peaks


def _blocks(table: WorkerTable, row: int, demand: Demand) -> int:
    return blocks_for(demand.prompt_tokens + 1, int(table.column("block_size")[row]))

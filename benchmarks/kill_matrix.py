"""What becomes of a service of which a part is killed, frozen or cut off at a moment of a handoff, cell by cell.

Sixteen clients stream answers of the recall model, whose right ones are known, from a real service: Ray actors, NIXL
over host memory. A handoff is held up at a moment (`benchmarks.faults.gate`), somebody is hurt, the handoff goes on. Of
each cell are told the answers from then until all is well again: right, wrong, failed by status; how long it took until
the gateway noticed; the slowest right answer; and the blocks that are missing once nobody asks anything any more.

Parts may be run one by one (`--target`, `--harm`, `--phase`, `--address`): each adds its cells to the result file, in
place of those of the same name.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, Environment
from benchmarks.faults.cells import ADDRESSES, HARMS, PHASES, TARGETS, Cell, all_cells
from benchmarks.faults.clients import QUESTIONS, Clients, questions
from benchmarks.faults.run_cell import run_cell
from benchmarks.faults.stage import stage
from benchmarks.markdown import read_result
from benchmarks.report import to_json, write_json
from cluster.client.client import AsyncBatonClient, Connection

CLIENTS = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 1: an answer was wrong, a block is missing, or the service did not recover."""
    parser = argparse.ArgumentParser("kill_matrix", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this one; may be repeated")
    parser.add_argument("--harm", action="append", choices=HARMS, help="as --target")
    parser.add_argument("--phase", action="append", choices=PHASES, help="as --target")
    parser.add_argument("--address", action="append", choices=ADDRESSES, help="as --target")
    parser.add_argument("--output", type=Path, default=RESULTS / "kill_matrix.json", metavar="FILE")
    args = parser.parse_args(argv)
    wanted = [
        cell
        for cell in all_cells()
        if cell.target in (args.target or TARGETS)
        and cell.harm in (args.harm or HARMS)
        and cell.phase in (args.phase or PHASES)
        and cell.address in (args.address or ADDRESSES)
    ]
    return asyncio.run(_run(wanted, args.output))


async def _run(wanted: Sequence[Cell], output: Path) -> int:
    failed = 0
    _merge(output, [{"cell": cell.name, "not_run": cell.not_run} for cell in wanted if cell.not_run])
    for target, address in dict.fromkeys((cell.target, cell.address) for cell in wanted if not cell.not_run):
        cells = [cell for cell in wanted if (cell.target, cell.address) == (target, address) and not cell.not_run]
        async with aclosing(run_part(cells)) as results:
            async for result in results:
                print(_line(result), flush=True)
                failed += not is_well(result)
                _merge(output, [result])
    return int(failed > 0)


async def run_part(cells: Sequence[Cell], num_questions: int = QUESTIONS) -> AsyncGenerator[dict[str, Any], None]:
    """Run cells of one target and address, on one service; what came of each."""
    environment = Environment.capture(1).to_json()
    with tempfile.TemporaryDirectory(prefix="baton-kills-", ignore_cleanup_errors=True) as folder:
        async with stage(cells[0].target, cells[0].address, Path(folder)) as made:
            async with AsyncBatonClient(Connection(made.address)) as client:
                asked = await questions(client, num_questions)
            clients = Clients(made.address, asked, CLIENTS)
            for cell in cells:
                result = await run_cell(made, cell, clients)
                log = result.pop("log")
                yield {**result, **({} if is_well(result) else {"log": log}), "environment": environment}


def is_well(result: dict[str, Any]) -> bool:
    """Whether nothing was wrong, nothing is missing, and the service is as before."""
    return not result["wrong"] and not result["blocks_missing"] and result["recovered_s"] is not None


def _merge(output: Path, results: Sequence[dict[str, Any]]) -> None:
    """Put cells into the result file, in the order of the matrix."""
    known = {cell["cell"]: cell for cell in read_result(output)["cells"]} if output.exists() else {}
    known |= {result["cell"]: result for result in results}
    order = [cell.name for cell in all_cells()]
    cells = sorted(known.values(), key=lambda cell: order.index(cell["cell"]))
    write_json(output, to_json("kill_matrix", Environment.capture(1), {"clients": CLIENTS}, {"cells": cells}))


def _line(result: dict[str, Any]) -> str:
    noticed = "not noticed" if result["noticed_s"] is None else f"{result['noticed_s']:.2f} s ({result['noticed_as']})"
    well = "not recovered" if result["recovered_s"] is None else f"well after {result['recovered_s']:.1f} s"
    return (
        f"{'    ' if is_well(result) else '!!  '}{result['cell']}: {result['right']} right, {result['wrong']} wrong, "
        f"failed {result['failed']}, {noticed}, slowest {result['slowest_s']:.1f} s, {well}, "
        f"{result['blocks_missing']} blocks missing ({result['blocks_quarantined']} in quarantine), "
        f"{result['processes_or_connections']} reached, {result['address']}"
    )


if __name__ == "__main__":
    sys.exit(main())

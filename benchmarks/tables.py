"""Writes the generated tables in docs/, so that nothing there that is measured or stated by the code is typed by hand.

python -m benchmarks.tables            write them
python -m benchmarks.tables --check    fail if they are out of date
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import (
    attention_tables,
    door_tables,
    fault_tables,
    gpu_change_tables,
    gpu_kernel_tables,
    gpu_tables,
    grammar_tables,
    model_tables,
    pool_tables,
    router_tables,
)
from benchmarks.disaggregation_cost import LABELS
from benchmarks.environment import RESULTS, ROOT
from benchmarks.markdown import provenance, read_result, table
from workers.errors import ConfigError

DOCS = ROOT / "docs"
_BLOCK = re.compile(r"(<!-- table: (?P<name>\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

Maker = Callable[[Path], str]
"""Makes a table, with what there is to say about its origin, given the folder of the raw results."""


def engine_vs_transformers(result: Mapping[str, Any]) -> str:
    """The comparison of the engine alone with `transformers`."""
    header = (
        "dtype",
        "case",
        "engine decode tok/s",
        "transformers decode tok/s",
        "ratio",
        "target",
        "engine end to end tok/s",
        "transformers end to end tok/s",
        "ratio",
        "same tokens",
    )
    rows = [
        (
            c["dtype"],
            c["case"],
            f"{c['engine']['decode_median']:.1f}",
            f"{c['transformers']['decode_median']:.1f}",
            f"**{c['decode_ratio']:.2f}×**",
            f"≥ {c['target']:.1f}×",
            f"{c['engine']['total_median']:.1f}",
            f"{c['transformers']['total_median']:.1f}",
            f"{c['total_ratio']:.2f}×",
            f"{c['equal_jobs']} of {len(c['jobs'])}",
        )
        for c in result["comparisons"]
    ]
    return table(header, rows, num_text_columns=2)


def disaggregation_cost(result: Mapping[str, Any]) -> str:
    """What disaggregation adds, a column for each model and prompt length."""
    cases = result["cases"]
    header = ("ms", *(f"{case['model']}, {case['prompt_tokens']} tokens" for case in cases))
    rows = [(label, *(f"{case['medians'][name] * 1e3:.2f}" for case in cases)) for name, label in LABELS.items()]
    rows.append(("KV cache moved, KiB", *(f"{case['medians']['kv_bytes'] / 1024:.0f}" for case in cases)))
    return table(header, rows, num_text_columns=1)


def _of_result(name: str, make: Callable[[Mapping[str, Any]], str]) -> Maker:
    """A table of the result file of that name, with its provenance below."""

    def make_table(results: Path) -> str:
        result = read_result(results / f"{name}.json")
        return f"{make(result)}\n\n{provenance(result['environment'])}"

    return make_table


PAGES: Mapping[str, Mapping[str, Maker]] = {
    "benchmarks.md": {
        "engine_vs_transformers": _of_result("engine_vs_transformers", engine_vs_transformers),
        "disaggregation_cost": _of_result("disaggregation_cost", disaggregation_cost),
        **gpu_tables.TABLES,
        **gpu_change_tables.TABLES,
        **gpu_kernel_tables.TABLES,
        **pool_tables.TABLES,
        **{name: _of_result(name, make) for name, make in router_tables.TABLES.items()},
        **{name: _of_result(name, make) for name, make in door_tables.TABLES.items()},
        **{name: _of_result("front_door", make) for name, make in door_tables.FRONT_DOOR.items()},
    },
    "attention.md": attention_tables.TABLES,
    "guarantees.md": fault_tables.TABLES,
    "metrics.md": {
        name: _of_result(name, door_tables.observing_cost) for name in ("observing_cost", "observing_cost_goals")
    },
    "models.md": model_tables.TABLES,
    "structured-output.md": {name: _of_result(name, make) for name, make in grammar_tables.TABLES.items()},
}
"""Page to its tables; a table to what makes it."""


def fill(text: str, tables: Mapping[str, Maker], results: Path) -> str:
    """`text` with the content of every marked table made anew.

    Raises:
        ConfigError: a marker without a table maker, a table without its marker, or a result file that is not there.
    """
    names = [match["name"] for match in _BLOCK.finditer(text)]
    if sorted(names) != sorted(tables):
        raise ConfigError(f"the page has markers for {sorted(names)}, there are tables for {sorted(tables)}")
    return _BLOCK.sub(lambda match: f"{match[1]}\n{tables[match['name']](results)}\n\n{match[3]}", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser("tables", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a table is out of date")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the pages; default: %(default)s")
    parser.add_argument("--page", action="append", choices=tuple(PAGES), help="only this page; may be repeated")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    args = parser.parse_args(argv)
    try:
        codes = [_write(args.docs / name, PAGES[name], args.results, args.check) for name in args.page or PAGES]
    except (ConfigError, OSError) as error:
        print(f"tables: {error}", file=sys.stderr)
        return 1
    return max(codes)


def _write(page: Path, tables: Mapping[str, Maker], results: Path, check: bool) -> int:
    """Write one page, or check it: 1 if it is out of date."""
    before = page.read_text(encoding="utf-8")
    after = fill(before, tables, results)
    if not check:
        page.write_text(after, encoding="utf-8")
    elif before != after:
        print(f"tables: {page} is out of date; run python -m benchmarks.tables", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

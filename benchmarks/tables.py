"""Writes the tables in docs/benchmarks.md from the raw results, so that no figure there is typed by hand.

python -m benchmarks.tables            write them
python -m benchmarks.tables --check    fail if they are out of date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.disaggregation_cost import LABELS
from benchmarks.environment import RESULTS, ROOT
from workers.errors import ConfigError

PAGE = ROOT / "docs" / "benchmarks.md"
_BLOCK = re.compile(r"(<!-- table: (?P<name>\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


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
    return _table(header, rows, num_text_columns=2)


def disaggregation_cost(result: Mapping[str, Any]) -> str:
    """What disaggregation adds, a column for each model and prompt length."""
    cases = result["cases"]
    header = ("ms", *(f"{case['model']}, {case['prompt_tokens']} tokens" for case in cases))
    rows = [(label, *(f"{case['medians'][name] * 1e3:.2f}" for case in cases)) for name, label in LABELS.items()]
    rows.append(("KV cache moved, KiB", *(f"{case['medians']['kv_bytes'] / 1024:.0f}" for case in cases)))
    return _table(header, rows, num_text_columns=1)


TABLES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "engine_vs_transformers": engine_vs_transformers,
    "disaggregation_cost": disaggregation_cost,
}
"""Name of a result file (and of its marker in the page) to what makes its table."""


def provenance(environment: Mapping[str, Any]) -> str:
    """One line: where, when and with what a result was measured."""
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
    dirty = " with changes" if environment["dirty"] else ""
    threads = "" if environment["threads"] is None else f", {environment['threads']} thread(s)"
    return (
        f"`{environment['command']}`, {environment['date']}, commit {environment['commit'][:12]}{dirty}; "
        f"{environment['cpu']}, {environment['cores']} cores{threads}; Python {environment['python']}, {packages}."
    )


def fill(text: str, results: Path) -> str:
    """`text` with the content of every marked table made anew from `results`.

    Raises:
        ConfigError: a marker without a table maker, a table without its marker, or a result file that is not there.
    """
    names = [match["name"] for match in _BLOCK.finditer(text)]
    if sorted(names) != sorted(TABLES):
        raise ConfigError(f"the page has markers for {sorted(names)}, there are tables for {sorted(TABLES)}")

    def replacement(match: re.Match[str]) -> str:
        result = _read(results / f"{match['name']}.json")
        table = TABLES[match["name"]](result)
        return f"{match[1]}\n{table}\n\n{provenance(result['environment'])}\n\n{match[3]}"

    return _BLOCK.sub(replacement, text)


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    return content


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], num_text_columns: int) -> str:
    rule = ["---" if column < num_text_columns else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser("tables", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a table is out of date")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    args = parser.parse_args(argv)
    try:
        before = args.page.read_text(encoding="utf-8")
        after = fill(before, args.results)
    except (ConfigError, OSError) as error:
        print(f"tables: {error}", file=sys.stderr)
        return 1
    if args.check:
        if before != after:
            print(f"tables: {args.page} is out of date; run python -m benchmarks.tables", file=sys.stderr)
        return int(before != after)
    args.page.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The tables of docs/benchmarks.md that put Baton beside vLLM on GPUs, from the result files of one run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.markdown import provenance, read_result, table
from workers.errors import ConfigError

ENGINE = {engine: f"gpu_engine_{engine}.json" for engine in ("baton", "vllm")}
LATENT = {"baton": "gpu_engine_deepseek-v2-lite.json", "vllm": "gpu_engine_vllm_deepseek-v2-lite.json"}
FROM_PIP = {"baton": "gpu_engine_pip_llama-3.1-8b.json", "vllm": "gpu_engine_vllm_llama-3.1-8b.json"}
MORE_POINTS = {"baton": "gpu_engine_more_llama-3.1-8b.json", "vllm": "gpu_engine_vllm_more_llama-3.1-8b.json"}
GPT_OSS = {"baton": "gpu_engine_gpt-oss-20b-mxfp4_prefill.json", "vllm": "gpu_engine_vllm_gpt-oss-20b.json"}
STAYING = {"baton": "gpu_engine_staying_llama-3.1-8b.json", "vllm": "gpu_engine_vllm_staying_llama-3.1-8b.json"}
GPT_OSS_DECODE = {"baton": "gpu_engine_gpt-oss-20b-mxfp4.json", "vllm": "gpu_engine_vllm_gpt-oss-20b_decode.json"}
QWEN3 = {"baton": "gpu_engine_qwen3-30b-a3b.json", "vllm": "gpu_engine_vllm_qwen3-30b-a3b.json"}
SERVICE = {(engine, gpus): f"gpu_service_{engine}_{gpus}gpu.json" for engine in ("baton", "vllm") for gpus in (1, 2)}
START = {(engine, gpus): f"gpu_start_{engine}_{gpus}gpu.json" for engine in ("baton", "vllm") for gpus in (1, 2)}
PUSH = ("push", 2)
_SERVICE_AND_PUSH = {**SERVICE, PUSH: "gpu_service_vllm_push_2gpu.json"}
UNDIVIDED = ("undivided", 1)
"""One worker on one GPU that does both."""
_SERVICE_AND_UNDIVIDED = {**SERVICE, UNDIVIDED: "gpu_service_baton_undivided.json"}
DECODE_GOAL, PREFILL_GOAL = 0.95, 1.0
HANDOFF_GOAL_S, HIDDEN_GOAL, HIDDEN_FROM = 0.003, 0.95, 2048
ITL_P99_GOAL_S, COLD_GOAL_S, WARM_GOAL_S = 0.008, 60.0, 30.0
_NONE = "No result is kept yet."
_DASH = "—"


def engine(results: Path, files: Mapping[str, str] = ENGINE, goals: bool = True) -> str:
    """Prefill rates and decode steps, with the limit of the same GPU, beside vLLM's of the same run.

    Args:
        results: the folder.
        files: of Baton and of vLLM.
        goals: whether the goals of Llama-3.1-8B's shape are theirs.
    """
    loaded = _load(results, files)
    ours = loaded.get("baton")
    if ours is None:
        return _NONE
    theirs = _by_point(loaded.get("vllm"))
    rows = [_prefill_row(row, theirs.get(("prefill", row["point"], False))) for row in ours["prefill"]]
    rows += [_decode_row(row, theirs.get(("decode", row["point"], row["sampled"]))) for row in ours["decode"]]
    header: tuple[str, ...] = (
        "batch × tokens",
        "measured",
        "Baton",
        "vLLM",
        "Baton / vLLM",
        "limit",
        "of the limit",
        "goal",
        "met",
    )
    if not goals:
        header, rows = header[:7], [row[:7] for row in rows]
    limits = ours["limits"]
    text = (
        f"Limits of the same GPU in the same run: copies at {limits['copy_bytes_per_s'] / 1e12:.2f} TB/s, "
        f"matrices at {limits['matrix_flops_per_s'] / 1e12:.0f} TFLOP/s."
    )
    return f"{table(header, rows, num_text_columns=2)}\n\n{text}\n\n{_provenance(loaded)}"


def handoff(results: Path) -> str:
    """What the handoff adds to the first token, one request at a time, in each one's own front door."""
    loaded = _load(results, _SERVICE_AND_UNDIVIDED)
    ours, theirs, undivided = (_lengths(loaded, name) for name in ("baton", "vllm", UNDIVIDED[0]))
    if not ours:
        return _NONE
    header = (
        "TTFT p50, ms", "Baton, one GPU", "1P1D", "handoff", "goal", "met",
        "one worker for both", "single token on 1P1D", "vLLM, one GPU", "1P1D", "handoff", "Baton / vLLM, 1P1D",
    )  # fmt: skip
    rows = []
    for length in sorted(ours):
        mine, other = ours[length], theirs.get(length, {})
        cost = _difference(mine, "ttft_s")
        rows.append(
            (
                f"{length} tokens",
                *(_ms(_value(mine, gpus, "ttft_s")) for gpus in (1, 2)),
                f"**{_ms(cost)}**",
                _at_most(HANDOFF_GOAL_S, 1e3),
                _met(None if cost is None else cost <= HANDOFF_GOAL_S),
                _ms(_value(undivided.get(length, {}), 1, "ttft_s")),
                _ms(_value(mine, 2, "alone_ttft_s")),
                *(_ms(_value(other, gpus, "ttft_s")) for gpus in (1, 2)),
                _ms(_difference(other, "ttft_s")),
                _ratio(_value(mine, 2, "ttft_s"), _value(other, 2, "ttft_s")),
            )
        )
    return f"{table(header, rows, num_text_columns=1)}\n\n{_provenance(loaded)}"


def second_token(results: Path) -> str:
    """The time to the second token, which no early first token can make look better, and what prefill hides."""
    loaded = _load(results, SERVICE)
    ours, theirs = _lengths(loaded, "baton"), _lengths(loaded, "vllm")
    if not ours:
        return _NONE
    header = (
        "second token p50, ms", "Baton, one GPU", "1P1D", "added", "vLLM, one GPU", "1P1D", "added",
        "exposed transfer", "hidden", "goal", "met",
    )  # fmt: skip
    rows = []
    for length in sorted(ours):
        mine, other = ours[length], theirs.get(length, {})
        hidden = mine.get(2, {}).get("hidden_share")
        counts = length >= HIDDEN_FROM
        cells: list[str] = []
        for side in (mine, other):
            cells += [_ms(_value(side, gpus, "second_token_s")) for gpus in (1, 2)]
            cells.append(_ms(_difference(side, "second_token_s")))
        rows.append(
            (
                f"{length} tokens",
                *cells,
                _ms(_value(mine, 2, "exposed_s")),
                _DASH if hidden is None else f"{hidden:.1%}",
                f"≥ {HIDDEN_GOAL:.0%}" if counts else "",
                _met(hidden >= HIDDEN_GOAL if counts and hidden is not None else None),
            )
        )
    return f"{table(header, rows, num_text_columns=1)}\n\n{_same_run(loaded)}"


def first_request(results: Path) -> str:
    """The first request that a new pair serves beside the ones that follow."""
    loaded = _load(results, _SERVICE_AND_PUSH)
    rows = []
    for name, key in (
        ("Baton, one GPU", ("baton", 1)),
        ("Baton, 1P1D", ("baton", 2)),
        ("vLLM, one GPU", ("vllm", 1)),
        ("vLLM, 1P1D, NixlConnector", ("vllm", 2)),
        ("vLLM, 1P1D, NixlPushConnector", PUSH),
    ):
        first = loaded.get(key, {}).get("first")
        if first is None:
            continue
        cells = [(values[0], min(values[1:])) for values in (first["ttft_s"], first["second_token_s"])]
        tokens = f"{first['prompt_tokens']} tokens"
        rows.append((name, tokens, *(_ms(s) for pair in cells for s in (*pair, pair[0] - pair[1]))))
    if not rows:
        return _NONE
    header = (
        "service", "prompts", "first TTFT, ms", "a later one", "difference", "first second token, ms", "a later one",
        "difference",
    )  # fmt: skip
    return f"{table(header, rows, num_text_columns=2)}\n\n{_same_run(loaded)}"


def load(results: Path) -> str:
    """The Poisson loads on 1P1D, a table for each."""
    loaded = _load(results, SERVICE)
    ours, theirs = (loaded.get((name, 2), {}).get("loads", []) for name in ("baton", "vllm"))
    if not ours:
        return _NONE
    tables = [_load_table(mine, next((x for x in theirs if x["load"] == mine["load"]), None)) for mine in ours]
    return "\n\n".join([*tables, _same_run(loaded)])


def _load_table(ours: Mapping[str, Any], theirs: Mapping[str, Any] | None) -> str:
    rows = []
    for label, of, goal in (
        ("TTFT p50, ms", ("ttft", "p50"), None),
        ("TTFT p99, ms", ("ttft", "p99"), None),
        ("ITL p50, ms", ("itl", "p50"), None),
        ("ITL p99, ms", ("itl", "p99"), ITL_P99_GOAL_S),
    ):
        mine, other = _summary(ours, *of), _summary(theirs, *of)
        limit = other if label.startswith("TTFT p50") else goal
        met = None if limit is None or mine is None else mine <= limit
        rows.append((label, _ms(mine), _ms(other), _ratio(mine, other), _at_most(limit, 1e3), _met(met)))
    rows.append(("requests that succeeded", _succeeded(ours), _succeeded(theirs), "", "", ""))
    header = (_load_text(ours["load"]), "Baton", "vLLM", "Baton / vLLM", "goal", "met")
    return table(header, rows, num_text_columns=1)


def start(results: Path) -> str:
    """From the start of the process to the first token served."""
    loaded = _load(results, START)
    rows = []
    for gpus in (1, 2):
        ours, theirs = loaded.get(("baton", gpus)), loaded.get(("vllm", gpus))
        if ours is None or "first_token_s" not in ours:
            continue
        cold = ours["config"]["cold_caches"]
        goal = COLD_GOAL_S if cold else WARM_GOAL_S
        mine, other = ours["first_token_s"], (theirs or {}).get("first_token_s")
        state = "empty" if cold else "filled"
        theirs_cold = theirs is not None and theirs["config"]["cold_caches"]
        if theirs is not None and bool(theirs_cold) != bool(cold):
            other = None  # not the same thing
        rows.append(
            (
                "one" if gpus == 1 else "1P1D on two",
                state,
                f"{mine:.1f} s",
                _DASH if other is None else f"{other:.1f} s",
                _ratio(mine, other),
                f"< {goal:.0f} s",
                _met(mine < goal),
            )
        )
    if not rows:
        return _NONE
    header = ("GPUs", "caches of compiled kernels", "Baton", "vLLM", "Baton / vLLM", "goal", "met")
    return f"{table(header, rows, num_text_columns=2)}\n\n{_provenance(loaded)}"


def group_sizes(results: Path) -> str:
    """How many layers one WRITE carries, and what that does to the first token."""
    path = results / "gpu_handoff_group_sizes.json"
    if not path.exists():
        return _NONE
    found = read_result(path)
    rows = []
    for group in found["groups"]:
        for length in group["lengths"]:
            with_handoff, alone = length["ttft_s"], length["alone_ttft_s"]
            cells = (_ms(with_handoff), _ms(alone), f"**{_ms(with_handoff - alone)}**", _ms(length["second_token_s"]))
            rows.append((f"{length['prompt_tokens']} tokens", str(group["layers_per_group"]), *cells))
    rows.sort(key=lambda row: (int(row[0].split()[0]), int(row[1])))
    header = ("TTFT p50, ms", "layers in a WRITE", "with a handoff", "for a single token", "difference", "second token")
    return f"{table(header, rows, num_text_columns=1)}\n\n{_provenance({'': found})}"


TABLES: Mapping[str, Callable[[Path], str]] = {
    "gpu_engine": engine,
    "gpu_engine_latent": partial(engine, files=LATENT, goals=False),
    "gpu_engine_qwen3": partial(engine, files=QWEN3, goals=False),
    "gpu_engine_from_pip": partial(engine, files=FROM_PIP, goals=False),
    "gpu_engine_more_points": partial(engine, files=MORE_POINTS, goals=False),
    "gpu_engine_staying": partial(engine, files=STAYING, goals=False),
    "gpu_engine_gpt_oss_decode": partial(engine, files=GPT_OSS_DECODE, goals=False),
    "gpu_engine_gpt_oss": partial(engine, files=GPT_OSS, goals=False),
    "gpu_handoff": handoff,
    "gpu_second_token": second_token,
    "gpu_first_request": first_request,
    "gpu_load": load,
    "gpu_start": start,
    "gpu_group_sizes": group_sizes,
}
"""Name of a marker in the page to what makes its table from the folder of results."""


def _load(results: Path, files: Mapping[Any, str]) -> dict[Any, dict[str, Any]]:
    """The result files that are there.

    Raises:
        ConfigError: they are not of one run: figures of two runs are never put side by side.
    """
    loaded = {key: read_result(results / name) for key, name in files.items() if (results / name).exists()}
    runs = {result["config"]["run"] for result in loaded.values()}
    if len(runs) > 1:
        raise ConfigError(f"{', '.join(files[key] for key in loaded)} are of different runs: {sorted(runs)}")
    return loaded


def _provenance(loaded: Mapping[Any, Mapping[str, Any]]) -> str:
    lines = []
    for result in loaded.values():
        config = result["config"]
        version = result.get("version") or config.get("version")
        what = f"{config['engine']} {version}" if version else config["engine"]
        names = Counter(config["gpu_names"])
        counted = " and ".join(name if count == 1 else f"{count} × {name}" for name, count in names.items())
        gpus = f"on {counted}; " if counted else ""
        note = f" {config['note']}" if config["note"] else ""
        lines.append(f"- {what}: {gpus}{provenance(result['environment'])}{note}")
    return "\n".join(dict.fromkeys(lines))  # several services of one run were started by one command


def _same_run(loaded: Mapping[Any, Mapping[str, Any]]) -> str:
    run = next(iter(loaded.values()))["config"]["run"]
    return f"Of run {run}, as the table of the handoff above, which says where and how." if run else ""


def _by_point(result: Mapping[str, Any] | None) -> dict[tuple[str, str, bool], Mapping[str, Any]]:
    if result is None:
        return {}
    kinds = ("prefill", "decode")
    return {(kind, row["point"], row.get("sampled", False)): row for kind in kinds for row in result[kind]}


def _prefill_row(row: Mapping[str, Any], other: Mapping[str, Any] | None) -> tuple[str, ...]:
    rate, theirs = row["tokens_per_s"], other["tokens_per_s"] if other else None
    batch, tokens = map(int, row["point"].split("x"))
    return (
        row["point"].replace("x", " × "),
        "prefill, tok/s",
        f"{rate / 1e3:.1f}k",
        _DASH if theirs is None else f"{theirs / 1e3:.1f}k",
        _ratio(rate, theirs),
        f"{batch * tokens / row['limit_s'] / 1e3:.1f}k",
        f"{row['of_limit']:.0%}",
        f"≥ {PREFILL_GOAL:.2f}",
        _met(None if theirs is None else rate >= PREFILL_GOAL * theirs),
    )


def _decode_row(row: Mapping[str, Any], other: Mapping[str, Any] | None) -> tuple[str, ...]:
    step, theirs = row["mean"], other["mean"] if other else None
    met = None if theirs is None or row["sampled"] else step <= DECODE_GOAL * theirs
    return (
        row["point"].replace("x", " × "),
        "decode step, ms" + (", sampled" if row["sampled"] else ""),
        f"{step * 1e3:.2f}",
        _DASH if theirs is None else f"{theirs * 1e3:.2f}",
        _ratio(step, theirs),
        f"{row['limit_s'] * 1e3:.2f}",
        f"{row['of_limit']:.0%}",
        "" if row["sampled"] else f"≤ {DECODE_GOAL:.2f}",
        _met(met),
    )


def _lengths(loaded: Mapping[tuple[str, int], Mapping[str, Any]], name: str) -> dict[int, dict[int, Mapping[str, Any]]]:
    """Prompt length to number of GPUs to what was measured."""
    found: dict[int, dict[int, Mapping[str, Any]]] = {}
    for gpus in (1, 2):
        for row in loaded.get((name, gpus), {}).get("lengths", []):
            found.setdefault(row["prompt_tokens"], {})[gpus] = row
    return found


def _value(rows: Mapping[int, Mapping[str, Any]], gpus: int, name: str) -> float | None:
    value: float | None = rows.get(gpus, {}).get(name)
    return value


def _difference(rows: Mapping[int, Mapping[str, Any]], name: str) -> float | None:
    one, two = _value(rows, 1, name), _value(rows, 2, name)
    return None if one is None or two is None else two - one


def _summary(result: Mapping[str, Any] | None, name: str, percentile: str) -> float | None:
    values = (result or {}).get("summary", {}).get(name)
    return None if values is None else float(values[percentile])


def _succeeded(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return _DASH
    summary = result["summary"]
    return f"{summary['by_status'].get('OK', 0)} of {summary['requests']}"


def _load_text(load: Mapping[str, Any]) -> str:
    return f"{load['prompt_tokens']} in, {load['output_tokens']} out, {load['rate']:g}/s for {load['duration_s']:g} s"


def _ms(seconds: float | None) -> str:
    return _DASH if seconds is None else f"{seconds * 1e3:.2f}" if abs(seconds) < 0.02 else f"{seconds * 1e3:.1f}"


def _ratio(ours: float | None, theirs: float | None) -> str:
    return _DASH if ours is None or not theirs else f"**{ours / theirs:.2f}**"


def _at_most(limit: float | None, unit: float) -> str:
    if limit is None:
        return ""
    value = limit * unit
    return f"≤ {value:.0f}" if value >= 100 else f"≤ {value:.3g}"


def _met(met: bool | None) -> str:
    return "" if met is None else "yes" if met else "**no**"

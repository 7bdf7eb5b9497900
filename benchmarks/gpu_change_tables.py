"""The tables of docs/benchmarks.md of changes to Baton on GPUs: what they cost, what they brought, new models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from benchmarks.markdown import provenance, read_result, table

GOAL_S = 0.003
_NONE = "No result is kept yet."
_LATENT_MODELS = {
    "deepseek-v2-lite": "deepseek-v2-lite_tma",
    "deepseek-v2-lite, later": "deepseek-v2-lite_decode",
    "moonlight-16b-a3b": "moonlight-16b-a3b",
    "glm-4.7-flash": "glm-4.7-flash",
    "deepseek-v3, 6 layers": "deepseek-v3-stack",
    "the same, decode on Hopper's own kernel": "deepseek-v3-stack_hopper",
}
_MIXTURES = {"gpt-oss-20b": "gpt-oss-20b"}


def commits(results: Path) -> str:
    """Two commits by turns on one card."""
    if not (results / "gpu_commits.json").exists():
        return _NONE
    found = read_result(results / "gpu_commits.json")
    config = found["config"]
    rows = [
        (
            row["point"].replace("x", " × "),
            *(", ".join(f"{s * 1e3:.2f}" for s in row[side]) for side in ("before", "after")),
            f"**{row['ratio']:.4f}**",
        )
        for row in found["points"]
    ]
    header = ("batch × tokens, ms", config["before"], config["after"], "after / before")
    return f"{table(header, rows, num_text_columns=1)}\n\n{provenance(found['environment'])}"


def handoff_measured_path(results: Path) -> str:
    """What the handoff adds, one request at a time, where the path between the workers was measured right."""
    files = [results / f"gpu_handoff_measured_path_{gpus}gpu.json" for gpus in (1, 2)]
    if not all(file.exists() for file in files):
        return _NONE
    one, two = map(read_result, files)
    rows = []
    for single, pair in zip(one["lengths"], two["lengths"], strict=True):
        cost = pair["ttft_s"] - single["ttft_s"]
        rows.append(
            (
                f"{single['prompt_tokens']} tokens",
                *(f"{row['ttft_s'] * 1e3:.1f}" for row in (single, pair)),
                f"**{cost * 1e3:.2f}**",
                f"≤ {GOAL_S * 1e3:.0f}",
                "yes" if cost <= GOAL_S else "**no**",
                f"{pair['alone_ttft_s'] * 1e3:.1f}",
                f"{(pair['second_token_s'] - single['second_token_s']) * 1e3:.2f}",
                f"{pair['exposed_s'] * 1e3:.2f}",
            )
        )
    header = (
        "TTFT p50, ms", "one GPU", "1P1D", "handoff", "goal", "met", "single token on 1P1D", "second token, added",
        "exposed transfer",
    )  # fmt: skip
    return f"{table(header, rows, num_text_columns=1)}\n\n{provenance(two['environment'])}"


def models_alone(results: Path, models: Mapping[str, str]) -> str:
    """Prefill rates and decode steps of Baton alone, with the limit of the same GPU.

    Args:
        results: the folder.
        models: what the table calls them, to what the result file does.
    """
    files = {name: results / f"gpu_engine_{file}.json" for name, file in models.items()}
    found = {name: read_result(file) for name, file in files.items() if file.exists()}
    if not found:
        return _NONE
    rows = []
    for name, result in found.items():
        for row in result["prefill"]:
            figure = f"{row['tokens_per_s'] / 1e3:.1f}k"
            rows.append((name, row["point"].replace("x", " × "), "prefill, tok/s", figure, f"{row['of_limit']:.0%}"))
        for row in result["decode"]:
            kind = "decode step, ms" + (", sampled" if row["sampled"] else "")
            figure = f"{row['mean'] * 1e3:.2f}"
            rows.append((name, row["point"].replace("x", " × "), kind, figure, f"{row['of_limit']:.0%}"))
    header = ("shape, random weights", "batch × tokens", "measured", "Baton", "of the limit")
    origins = "\n".join(f"- {provenance(result['environment'])}" for result in found.values())
    return f"{table(header, rows, num_text_columns=3)}\n\n{origins}"


def gated_linear(results: Path) -> str:
    """SwiGLU's first half in two kernels and in one."""
    if not (results / "gated_linear_h200.json").exists():
        return _NONE
    found = read_result(results / "gated_linear_h200.json")
    rows = [
        (
            name,
            " × ".join(map(str, product["shape"])),
            num_rows,
            *(f"{us[way]:.0f}" for way in ("two kernels", "one kernel")),
            f"**{us['one kernel'] / us['two kernels']:.2f}**",
        )
        for name, product in found["shapes"].items()
        for num_rows, us in product["us"].items()
    ]
    header = ("of", "weight", "rows", "two kernels, µs", "one, µs", "one / two")
    return f"{table(header, rows, num_text_columns=2)}\n\n{provenance(found['environment'])}"


TABLES: Mapping[str, Callable[[Path], str]] = {
    "gpu_commits": commits,
    "gpu_handoff_measured_path": handoff_measured_path,
    "gpu_mixtures_of_experts": partial(models_alone, models=_MIXTURES),
    "gpu_latent_models": partial(models_alone, models=_LATENT_MODELS),
    "gpu_gated_linear": gated_linear,
}
"""Name of a marker in the page to what makes its table from the folder of results."""

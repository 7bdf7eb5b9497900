"""The tables of docs/benchmarks.md of single kernels on GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.markdown import provenance, read_result, table

_NONE = "No result is kept yet."


def latent_decode(results: Path) -> str:
    """Decode of latent attention by Baton's own kernels, now and before, and by FlashInfer's."""
    files = [results / f"latent_{name}_h200.json" for name in ("decode", "attention")]
    if not all(file.exists() for file in files):
        return _NONE
    now, before = map(read_result, files)
    own, (earlier, theirs) = _decodes(now, "TRITON_MLA"), (_decodes(before, name) for name in _COMPARED)
    rows = [
        (
            str(heads),
            f"{batch} × {context}" + (", FP8" if fp8 else ""),
            f"**{row['seconds'] * 1e6:.1f}**",
            *(f"{of[key]['seconds'] * 1e6:.1f}" if key in of else "—" for of in (earlier, theirs)),
            f"{row['flops_per_s'] / 1e12:.0f}",
            f"{row['of_bandwidth']:.0%}",
        )
        for key, row in own.items()
        for heads, batch, context, fp8 in (key,)
    ]
    header = (
        "heads", "batch × context", "Baton, µs", "Baton before", "FlashInfer", "TFLOP/s", "of a copy's bandwidth",
    )  # fmt: skip
    origins = "\n".join(f"- {provenance(found['environment'])}" for found in (now, before))
    return f"{table(header, rows, num_text_columns=2)}\n\n{origins}"


_COMPARED = ("TRITON_MLA", "FLASHINFER_MLA")


def _decodes(found: Mapping[str, Any], backend: str) -> dict[tuple[int, int, int, bool], Mapping[str, Any]]:
    return {
        (row["heads"], row["batch"], row["context"], row["fp8"]): row
        for row in found["rows"]
        if row["backend"] == backend and row["phase"] == "decode" and "seconds" in row
    }


def mxfp4_experts(results: Path) -> str:
    """A layer's two products with experts in MXFP4, by the fastest tile, and in bfloat16."""
    file = results / "moe_mxfp4_h200.json"
    if not file.exists():
        return _NONE
    found = read_result(file)
    rows = []
    for point in found["points"]:
        products = [point[which] for which in ("gate_up", "down")]
        kept = sum(min(us for name, us in product["us"].items() if name != "bfloat16") for product in products)
        plain = sum(product["us"]["bfloat16"] for product in products)
        rows.append(
            (
                str(point["tokens"]),
                f"{point['experts']:.1f}",
                f"{plain:.0f}",
                f"**{kept:.0f}**",
                f"**{kept / plain:.2f}**",
                " · ".join(f"{product['of_bandwidth']:.0%}" for product in products),
            )
        )
    header = ("tokens", "experts read", "bfloat16, µs", "MXFP4", "MXFP4 / bfloat16", "of 4.2 TB/s, first · second")
    return f"{table(header, rows, num_text_columns=1)}\n\n{provenance(found['environment'])}"


TABLES: Mapping[str, Callable[[Path], str]] = {
    "gpu_latent_decode": latent_decode,
    "gpu_mxfp4_experts": mxfp4_experts,
}
"""Name of a marker in the page to what makes its table from the folder of results."""

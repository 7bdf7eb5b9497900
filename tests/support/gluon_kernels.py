"""Compiles every kernel in Gluon for SM 9.0, without a GPU. Run as a process in which Triton does not interpret."""

from __future__ import annotations

from typing import Any

from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from attention.ops.triton.latent.few_heads_kernel import few_heads_latent_decode_kernel
from attention.ops.triton.latent.hopper_kernel import hopper_latent_decode_kernel
from attention.ops.triton.staying_decode_kernel import staying_decode_kernel
from workers.ops.triton.mxfp4_few_rows import mxfp4_few_rows_kernel

TYPES = {
    **dict.fromkeys(("partial_ptr", "partial_lse_ptr", "lse_ptr"), "*fp32"),
    **dict.fromkeys(("table_ptr", "seq_lens_ptr", "counters_ptr"), "*i32"),
    **dict.fromkeys(("exponents_ptr", "pairs_ptr", "tiles_ptr"), "*i32"),
    **dict.fromkeys(("scale", "v_scale", "cache_scale"), "fp32"),
    "words_ptr": "*i16",
}
"""Of arguments; of other pointers bfloat16, of all else int32."""


def compile_for_hopper(kernel: Any, **constants: Any) -> None:
    """Compile with these constants and arguments as a launch has them: aligned pointers and strides."""
    types, attributes, values = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name], values[place,] = "constexpr", constants[name]
            continue
        types[name] = TYPES.get(name, "*bf16" if name.endswith("_ptr") else "i32")
        if name in ("halves", "rotary"):
            width = 256 if name == "halves" else 64
            layout = gl.NVMMASharedLayout.get_default_for([64, width], gl.bfloat16)
            types[name] = f"tensordesc<bf16[64, {width}],{layout!r}>"
        elif types[name].startswith("*") or (name.startswith("stride") and name != "stride_table"):
            attributes[place,] = [["tt.divisibility", 16]]
    source = GluonASTSource(kernel, types, constexprs=values, attrs=attributes)
    compile_kernel(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "launch_pdl": True})
    print(kernel.__name__)


def main() -> None:
    """All kernels, in the forms that differ most."""
    dealt = {"BLOCK_SIZE": 64, "MIN_TILES": 2, "PDL": True}
    whole = {"partial_ptr": None, "partial_lse_ptr": None}
    for split in ({"lse_ptr": None}, whole):
        own = {"NUM_HEADS": 32, "D": 128, "BATCH_PADDED": 32, "STAGES": 3}
        compile_for_hopper(staying_decode_kernel, GROUP=16 if split is whole else 4, **own, **dealt, **split)
        for fp8 in (False, True):
            own = {"NUM_HEADS": 16, "R": 512, "P": 64, "KEYS": 32, "STAGES": 3, "FP8": fp8}
            compile_for_hopper(few_heads_latent_decode_kernel, **own, **dealt, **split)
    own = {"NUM_HEADS": 128, "R": 512, "P": 64, "lse_ptr": None}
    compile_for_hopper(hopper_latent_decode_kernel, **own, **dealt, **whole)
    for gated in (False, True):
        compile_for_hopper(
            mxfp4_few_rows_kernel, NUM_EXPERTS=32, M=2880, K=2880, PAIRS_PER_ROW=4 * gated, SPREAD=not gated,
            KIND="clamped_swiglu" if gated else None, ALPHA=1.7, LIMIT=7.0, ROWS=8, OUTPUTS=64, STAGES=4, TILES=64,
            ROUTED_BEFORE=not gated, PDL=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()

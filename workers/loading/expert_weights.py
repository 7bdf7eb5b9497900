"""Where the experts of a checkpoint go in `workers.layers.moe.experts.Experts`: the ways they are stored in.

Names are within a layer. Of several ranks each holds some of every expert's inner features: those rows of gate and up,
and those columns of down. All are read from the checkpoint into the stacked parameters without a copy in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from workers.errors import ConfigError
from workers.loading.dequantize import MXFP4_BLOCK
from workers.loading.quantized_storage import Fp8BlockStorage, Mxfp4Storage
from workers.loading.stored_tensor import whole
from workers.loading.weight_target import QuantizedSource, WeightTarget

GATE_UP, DOWN = "gate_up_proj", "down_proj"


@dataclass(frozen=True)
class ExpertSizes:
    """The experts of a layer, and one rank's share of them.

    Attributes:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I of the whole model.
        rank: this rank.
        size: ranks.
        first: the number that expert 0 of the checkpoint has among ours.

    Raises:
        ConfigError: the ranks do not divide I.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    rank: int = 0
    size: int = 1
    first: int = 0

    def __post_init__(self) -> None:
        if self.intermediate_size % self.size:
            raise ConfigError(
                f"{self.size} ranks do not divide the {self.intermediate_size} inner features of an expert"
            )

    @property
    def share(self) -> int:
        """Inner features of this rank."""
        return self.intermediate_size // self.size

    @property
    def rows(self) -> tuple[int, int]:
        """Where the experts are in a stacked parameter: the first of them, and one past the last."""
        return self.first, self.first + self.num_experts

    @property
    def own(self) -> tuple[int, int]:
        """The first of them, and one past the last."""
        return self.rank * self.share, (self.rank + 1) * self.share


def expert_by_expert(
    sizes: ExpertSizes,
    prefix: str = "mlp.experts",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    parameter: str = "mlp.experts",
) -> dict[str, WeightTarget]:
    """A tensor for each matrix of each expert: Qwen-MoE, DeepSeek; Mixtral with (w1, w3, w2).

    Args:
        sizes: of the layer.
        prefix: of the checkpoint's names: `prefix.7.gate_proj.weight`.
        names: of gate, up and down.
        parameter: name of the module.
    """
    inner, hidden, share = sizes.intermediate_size, sizes.hidden_size, sizes.share
    rows, columns = (sizes.own, (0, hidden)), ((0, hidden), sizes.own)
    gate, up, down = names
    targets = {}
    for e in range(sizes.num_experts):
        for name, place, shape, region, begin, end in (
            (gate, GATE_UP, (inner, hidden), rows, 0, share),
            (up, GATE_UP, (inner, hidden), rows, share, 2 * share),
            (down, DOWN, (hidden, inner), columns, 0, hidden),
        ):
            targets[f"{prefix}.{e}.{name}.weight"] = WeightTarget(
                f"{parameter}.{place}.weight", shape, region, begin, end, index=(sizes.first + e,)
            )
    return targets


def fused(sizes: ExpertSizes, prefix: str = "mlp.experts", parameter: str = "mlp.experts") -> dict[str, WeightTarget]:
    """Two tensors as ours, (E, 2 * I, H) with gate above up and (E, H, I): how transformers 5 has them in memory.

    `save_pretrained(save_original_format=False)` writes the families of `expert_by_expert` so.
    """
    num, hidden, inner = sizes.num_experts, sizes.hidden_size, sizes.intermediate_size
    return {
        f"{prefix}.gate_up_proj": WeightTarget(
            f"{parameter}.{GATE_UP}.weight",
            (num, 2 * inner, hidden),
            (*whole((num, 2)), sizes.own, (0, hidden)),
            *sizes.rows,
            view=(num, 2, inner, hidden),
            arrange=_above,
        ),
        f"{prefix}.down_proj": WeightTarget(
            f"{parameter}.{DOWN}.weight", (num, hidden, inner), (*whole((num, hidden)), sizes.own), *sizes.rows
        ),
    }


def stacked(sizes: ExpertSizes, prefix: str = "mlp.experts", parameter: str = "mlp.experts") -> dict[str, WeightTarget]:
    """Two tensors, (E, H, 2 * I) with gate beside up and (E, I, H): Llama-4. Their matrices are transposed."""
    num, hidden, inner = sizes.num_experts, sizes.hidden_size, sizes.intermediate_size
    return {
        f"{prefix}.gate_up_proj": WeightTarget(
            f"{parameter}.{GATE_UP}.weight",
            (num, hidden, 2 * inner),
            (*whole((num, hidden, 2)), sizes.own),
            *sizes.rows,
            view=(num, hidden, 2, inner),
            arrange=_beside_and_transposed,
        ),
        f"{prefix}.down_proj": _transposed_down(sizes, prefix, parameter),
    }


def interleaved(
    sizes: ExpertSizes, prefix: str = "mlp.experts", parameter: str = "mlp.experts"
) -> dict[str, WeightTarget]:
    """As `stacked`, but the columns of gate and up take turns, and there are biases: gpt-oss in bfloat16."""
    num, hidden, inner = sizes.num_experts, sizes.hidden_size, sizes.intermediate_size
    return {
        f"{prefix}.gate_up_proj": WeightTarget(
            f"{parameter}.{GATE_UP}.weight",
            (num, hidden, 2 * inner),
            (*whole((num, hidden)), sizes.own, (0, 2)),
            *sizes.rows,
            view=(num, hidden, inner, 2),
            arrange=_interleaved_and_transposed,
        ),
        f"{prefix}.down_proj": _transposed_down(sizes, prefix, parameter),
        **_interleaved_biases(sizes, prefix, parameter),
    }


def interleaved_mxfp4(
    sizes: ExpertSizes, prefix: str = "mlp.experts", parameter: str = "mlp.experts"
) -> dict[str, WeightTarget]:
    """As `interleaved`, in blocks of MXFP4, their matrices as ours: gpt-oss as it was published.

    Raises:
        ConfigError: a matrix is not made of whole blocks.
    """
    num, hidden, inner = sizes.num_experts, sizes.hidden_size, sizes.intermediate_size
    if hidden % MXFP4_BLOCK or inner % MXFP4_BLOCK:
        raise ConfigError(f"MXFP4 stores multiples of {MXFP4_BLOCK} inputs, not {hidden} and {inner}")
    storage, targets = Mxfp4Storage(), _interleaved_biases(sizes, prefix, parameter)
    for name, rows, columns, view, region, arrange in (
        (GATE_UP, 2 * inner, hidden, (num, inner, 2, hidden), (sizes.own, (0, 2), (0, hidden)), _interleaved),
        (DOWN, hidden, inner, (num, hidden, inner), ((0, hidden), sizes.own), None),
    ):
        shape = (num, rows, columns)
        targets[f"{prefix}.{name}_blocks"] = WeightTarget(
            f"{parameter}.{name}.weight",
            storage.values_shape(shape),
            ((0, num), *region),
            *sizes.rows,
            view=view,
            arrange=arrange,
            quantized=QuantizedSource(storage, f"{prefix}.{name}_scales", storage.scales_shape(shape)),
        )
    return targets


def kept_in_mxfp4(name: str, target: WeightTarget) -> dict[str, WeightTarget]:
    """A target that is dequantised as two that are not: `blocks` and `scales` in place of `weight`.

    Args:
        name: of the blocks in the checkpoint.
        target: of `interleaved_mxfp4`.

    Raises:
        ConfigError: the rank's share of the inputs does not begin or end with a block.
    """
    source = target.quantized
    assert source is not None
    assert source.scales is not None
    assert isinstance(source.storage, Mxfp4Storage)
    begin, end = target.region[-1]
    if begin % MXFP4_BLOCK or end % MXFP4_BLOCK:
        raise ConfigError(f"inputs {begin} to {end} of {name} are not whole MXFP4 blocks of {MXFP4_BLOCK}")
    storage, module = source.storage, target.parameter.removesuffix("weight")
    kept = replace(target, quantized=None, raw=True)
    return {
        name: replace(
            kept,
            parameter=f"{module}blocks",
            view=storage.values_shape(target.viewed),
            region=storage.values_region(target.region),
        ),
        source.scales: replace(
            kept,
            parameter=f"{module}scales",
            shape=source.scales_shape,
            view=storage.scales_shape(target.viewed),
            region=storage.scales_region(target.region),
        ),
    }


def in_fp8_blocks(
    targets: Mapping[str, WeightTarget], storage: Fp8BlockStorage | None = None
) -> dict[str, WeightTarget]:
    """The same tensors in FP8 with a `weight_scale_inv` beside each: DeepSeek-V3's checkpoints.

    Args:
        targets: matrices whose names end in `.weight`; others stay as they are.
        storage: the size of a block; None: 128 x 128.
    """
    storage = storage or Fp8BlockStorage()
    return {
        name: replace(
            target, quantized=QuantizedSource(storage, f"{name}_scale_inv", storage.scales_shape(target.shape))
        )
        if name.endswith(".weight") and len(target.shape) == 2
        else target
        for name, target in targets.items()
    }


def _transposed_down(sizes: ExpertSizes, prefix: str, parameter: str) -> WeightTarget:
    num, hidden, inner = sizes.num_experts, sizes.hidden_size, sizes.intermediate_size
    region = ((0, num), sizes.own, (0, hidden))
    return WeightTarget(f"{parameter}.{DOWN}.weight", (num, inner, hidden), region, *sizes.rows, arrange=_transposed)


def _interleaved_biases(sizes: ExpertSizes, prefix: str, parameter: str) -> dict[str, WeightTarget]:
    num, hidden, inner = sizes.num_experts, sizes.hidden_size, sizes.intermediate_size
    return {
        f"{prefix}.gate_up_proj_bias": WeightTarget(
            f"{parameter}.{GATE_UP}.bias",
            (num, 2 * inner),
            ((0, num), sizes.own, (0, 2)),
            *sizes.rows,
            view=(num, inner, 2),
            arrange=_interleaved,
        ),
        f"{prefix}.down_proj_bias": WeightTarget(
            f"{parameter}.{DOWN}.bias", (num, hidden), whole((num, hidden)), *sizes.rows
        ),
    }


def _transposed(rows: torch.Tensor) -> torch.Tensor:
    """(E, M, K) as (E, K, M)."""
    return rows.mT


def _above(rows: torch.Tensor) -> torch.Tensor:
    """(E, 2 * I, H), gate above up, as (E, 2, I, H)."""
    view: torch.Tensor = rows.unflatten(1, (2, -1))
    return view


def _beside_and_transposed(rows: torch.Tensor) -> torch.Tensor:
    """(E, 2 * I, H), gate above up, as (E, H, 2, I)."""
    view: torch.Tensor = rows.unflatten(1, (2, -1)).permute(0, 3, 1, 2)
    return view


def _interleaved_and_transposed(rows: torch.Tensor) -> torch.Tensor:
    """(E, 2 * I, H), gate above up, as (E, H, I, 2)."""
    view: torch.Tensor = rows.unflatten(1, (2, -1)).permute(0, 3, 2, 1)
    return view


def _interleaved(rows: torch.Tensor) -> torch.Tensor:
    """(E, 2 * I, ...), gate above up, as (E, I, 2, ...)."""
    view: torch.Tensor = rows.unflatten(1, (2, -1)).transpose(1, 2)
    return view

"""Experts out of checkpoints, however they are stored there, into the stacked parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from workers.errors import CheckpointError, ConfigError
from workers.layers.activation import GatedActivation
from workers.layers.moe.experts import Experts
from workers.loading.checkpoint import stored_tensors
from workers.loading.dequantize import dequantize_fp8_blocks, dequantize_mxfp4
from workers.loading.expert_weights import (
    ExpertSizes,
    expert_by_expert,
    in_fp8_blocks,
    interleaved,
    interleaved_mxfp4,
    stacked,
)
from workers.loading.placements import placement
from workers.loading.quantized_storage import Fp8BlockStorage
from workers.loading.weight_stream import load_tensors
from workers.loading.weight_target import WeightTarget, of_layer

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
E, H, I = 3, 64, 96  # noqa: E741
PREFIX = "model.layers.5."
Tensors = dict[str, torch.Tensor]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_bytes(*shape: int, low: int = 0, high: int = 256) -> torch.Tensor:
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def separate() -> tuple[Tensors, Tensors]:
    """A checkpoint's tensors, and what they mean as (E, I, H) gate and up, (E, H, I) down, biases."""
    gate, up, down = randn(E, I, H), randn(E, I, H, seed=1), randn(E, H, I, seed=2)
    tensors = {
        f"mlp.experts.{e}.{name}.weight": matrices[e].clone()
        for name, matrices in (("w1", gate), ("w3", up), ("w2", down))
        for e in range(E)
    }
    return tensors, {"gate": gate, "up": up, "down": down}


def llama4() -> tuple[Tensors, Tensors]:
    gate_up, down = randn(E, H, 2 * I), randn(E, I, H, seed=1)
    gate, up = gate_up.mT.chunk(2, dim=1)
    tensors = {"mlp.experts.gate_up_proj": gate_up, "mlp.experts.down_proj": down}
    return tensors, {"gate": gate, "up": up, "down": down.mT}


def gpt_oss() -> tuple[Tensors, Tensors]:
    gate_up, down = randn(E, H, 2 * I), randn(E, I, H, seed=1)
    gate_up_bias, down_bias = randn(E, 2 * I, seed=2), randn(E, H, seed=3)
    tensors = {
        "mlp.experts.gate_up_proj": gate_up,
        "mlp.experts.down_proj": down,
        "mlp.experts.gate_up_proj_bias": gate_up_bias,
        "mlp.experts.down_proj_bias": down_bias,
    }
    return tensors, {
        "gate": gate_up[..., ::2].mT,
        "up": gate_up[..., 1::2].mT,
        "down": down.mT,
        "gate_bias": gate_up_bias[:, ::2],
        "up_bias": gate_up_bias[:, 1::2],
        "down_bias": down_bias,
    }


def gpt_oss_mxfp4() -> tuple[Tensors, Tensors]:
    tensors, meaning = gpt_oss()
    for name, rows, columns in (("gate_up_proj", 2 * I, H), ("down_proj", H, I)):
        del tensors[f"mlp.experts.{name}"]
        tensors[f"mlp.experts.{name}_blocks"] = random_bytes(E, rows, columns // 32, 16)
        tensors[f"mlp.experts.{name}_scales"] = random_bytes(E, rows, columns // 32, low=120, high=130)
    gate_up, down = (
        dequantize_mxfp4(tensors[f"mlp.experts.{name}_blocks"], tensors[f"mlp.experts.{name}_scales"], torch.float32)
        for name in ("gate_up_proj", "down_proj")
    )
    return tensors, {**meaning, "gate": gate_up[:, ::2], "up": gate_up[:, 1::2], "down": down}


def deepseek_fp8() -> tuple[Tensors, Tensors]:
    tensors, _ = separate()
    block = (32, 16)
    for name in list(tensors):
        rows, columns = tensors[name].shape
        tensors[name] = (tensors[name] * 50).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = randn(rows // block[0], columns // block[1], seed=len(tensors)).abs()
    meant = {
        name: torch.stack(
            [
                dequantize_fp8_blocks(
                    tensors[f"mlp.experts.{e}.{stored}.weight"],
                    tensors[f"mlp.experts.{e}.{stored}.weight_scale_inv"],
                    torch.float32,
                    block,
                )
                for e in range(E)
            ]
        )
        for name, stored in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    }
    return tensors, meant


def mixtral(sizes: ExpertSizes) -> dict[str, WeightTarget]:
    return expert_by_expert(sizes, names=("w1", "w3", "w2"))


Case = tuple[Callable[[], tuple[Tensors, Tensors]], Callable[[ExpertSizes], dict[str, WeightTarget]]]
CASES: dict[str, Case] = {
    "an expert at a time": (separate, mixtral),
    "stacked": (llama4, stacked),
    "interleaved": (gpt_oss, interleaved),
    "interleaved mxfp4": (gpt_oss_mxfp4, interleaved_mxfp4),
    "fp8 blocks": (deepseek_fp8, lambda sizes: in_fp8_blocks(mixtral(sizes), Fp8BlockStorage((32, 16)))),
}


class Layer(torch.nn.Module):
    def __init__(self, share: int, bias: bool, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.mlp = torch.nn.Module()
        self.mlp.experts = Experts(E, H, share, GatedActivation(), dtype, device, bias=bias)
        for parameter in self.parameters():
            parameter.fill_(float("nan"))


def load(
    folder: Path,
    targets: dict[str, WeightTarget],
    layer: Layer,
    device: torch.device,
    piece_bytes: int = 2**20,
) -> list[int]:
    found = {stored.name: stored for stored in stored_tensors(folder)}
    parameters = {f"layers.5.{name}": parameter for name, parameter in layer.named_parameters()}
    placed = []
    for name, target in targets.items():
        placed.append(placement(PREFIX + name, of_layer(target, PREFIX, "layers.5."), found, parameters))
    read: list[int] = []
    load_tensors(placed, device, read.append, piece_bytes, num_threads=2)
    assert sum(read) == sum(placement.nbytes for placement in placed)
    return read


def save(folder: Path, tensors: Tensors) -> None:
    save_file({PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("size", "piece_bytes"), [(1, 2**20), (1, 512), (2, 2**20), (2, 512), (4, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_rank_gets_its_share_of_every_expert(
    tmp_path: Path, device: torch.device, case: str, size: int, piece_bytes: int, dtype: torch.dtype
) -> None:
    """With four ranks a share of 24 inner features begins within a block of MXFP4 and of FP8."""
    make, targets = CASES[case]
    tensors, meant = make()
    save(tmp_path, tensors)
    for rank in range(size):
        sizes = ExpertSizes(E, H, I, rank, size)
        own = slice(*sizes.own)
        layer = Layer(sizes.share, "gate_bias" in meant, dtype, device)
        read = load(tmp_path, targets(sizes), layer, device, piece_bytes)
        assert max(read) <= max(piece_bytes, 2 * I * 4), "a row is not cut"
        experts = layer.mlp.experts
        gate_up = torch.cat([meant["gate"][:, own], meant["up"][:, own]], dim=1).to(dtype)
        assert torch.equal(experts.gate_up_proj.weight.cpu(), gate_up)
        assert torch.equal(experts.down_proj.weight.cpu(), meant["down"][..., own].to(dtype))
        if "gate_bias" in meant:
            bias = torch.cat([meant["gate_bias"][:, own], meant["up_bias"][:, own]], dim=1).to(dtype)
            assert torch.equal(experts.gate_up_proj.bias.cpu(), bias)
            assert torch.equal(experts.down_proj.bias.cpu(), meant["down_bias"].to(dtype))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("gate_up_proj_blocks", random_bytes(E, 2 * I, 1, 16), r"_blocks has shape .* where \(3, 192, 2, 16\)"),
        ("gate_up_proj_scales", random_bytes(E, 2 * I, 1), r"_scales has shape .* where \(3, 192, 2\)"),
        ("down_proj_blocks", randn(E, H, 3, 16), "_blocks has dtype F32, it must be one of U8"),
        ("down_proj_scales", randn(E, H, 3), "_scales has dtype F32, it must be one of U8"),
    ],
)
def test_quantised_tensors_of_another_kind_are_refused(
    tmp_path: Path, name: str, tensor: torch.Tensor, message: str
) -> None:
    tensors, _ = gpt_oss_mxfp4()
    save(tmp_path, {**tensors, f"mlp.experts.{name}": tensor})
    targets, layer = interleaved_mxfp4(ExpertSizes(E, H, I)), Layer(I, True, torch.float32, torch.device("cpu"))
    with pytest.raises(CheckpointError, match=message) as error:
        load(tmp_path, targets, layer, torch.device("cpu"))
    assert PREFIX in str(error.value)


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="5 ranks do not divide the 96 inner features"):
        ExpertSizes(E, H, I, 0, 5)
    with pytest.raises(ConfigError, match="multiples of 32 inputs, not 48 and 96"):
        interleaved_mxfp4(ExpertSizes(E, 48, I))


def test_a_target_of_another_shape_is_refused(tmp_path: Path) -> None:
    tensors, _ = llama4()
    save(tmp_path, tensors)
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match=r"\(3, 64, 2, 96\) of tensor model.layers.5.* for a target of shape"):
        load(tmp_path, stacked(ExpertSizes(E, H, I)), Layer(I // 2, False, torch.float32, cpu), cpu)

"""Tensors on their way from files into parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from workers.errors import CheckpointError
from workers.loading.checkpoint import stored_tensors
from workers.loading.pieces import Placement
from workers.loading.stored_tensor import Region, StoredTensor
from workers.loading.weight_stream import load_tensors
from workers.models.loader import load_model, model_bytes

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TENSORS = {
    "double": torch.randn(7, dtype=torch.float64),
    "single": torch.randn(33, 5),
    "half": torch.randn(3, 100).half(),
    "brain": torch.randn(513, 2).bfloat16(),
}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


def by_name(folder: Path) -> dict[str, StoredTensor]:
    return {stored.name: stored for stored in stored_tensors(folder)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("piece_bytes", "num_threads"), [(64, 1), (64, 4), (2**20, 3)])
def test_every_tensor_arrives_whole(
    folder: Path, device: torch.device, dtype: torch.dtype, piece_bytes: int, num_threads: int
) -> None:
    targets = {name: torch.full(tensor.shape, 9.0, dtype=dtype, device=device) for name, tensor in TENSORS.items()}
    read: list[int] = []
    placements = [Placement(stored, targets[name]) for name, stored in by_name(folder).items()]
    load_tensors(placements, device, read.append, piece_bytes, num_threads)
    for name, tensor in TENSORS.items():
        assert torch.equal(targets[name].cpu(), tensor.to(dtype)), name
    assert sum(read) == sum(tensor.nbytes for tensor in TENSORS.values())
    assert max(read) <= piece_bytes


def test_a_tensor_may_fill_some_rows_or_be_repeated_in_each(folder: Path, device: torch.device) -> None:
    fused, repeated = torch.zeros(40, 5, device=device), torch.zeros(4, 7, dtype=torch.bfloat16, device=device)
    stored = by_name(folder)
    load_tensors([Placement(stored["single"], fused[2:35]), Placement(stored["double"], repeated[1:3])], device)
    assert torch.equal(fused[2:35].cpu(), TENSORS["single"])
    assert not fused[:2].any()
    assert not fused[35:].any()
    assert torch.equal(repeated[1:3].cpu(), TENSORS["double"].bfloat16().expand(2, 7))
    assert not repeated[0].any()
    assert not repeated[3].any()


REGIONS: dict[str, list[Region]] = {
    "single": [((3, 30), (0, 5)), ((0, 33), (2, 4)), ((31, 33), (4, 5)), ((5, 5), (0, 5))],
    "half": [((1, 2), (0, 100)), ((0, 3), (50, 100)), ((0, 3), (25, 26))],
    "double": [((2, 5),)],
    "brain": [((0, 513), (1, 2)), ((511, 513), (0, 2))],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("piece_bytes", "num_threads"), [(16, 1), (64, 4), (2**20, 3)])
def test_a_part_of_a_tensor(
    folder: Path, device: torch.device, dtype: torch.dtype, piece_bytes: int, num_threads: int
) -> None:
    stored, wanted, placements = by_name(folder), [], []
    for name, regions in REGIONS.items():
        for region in regions:
            wanted.append(TENSORS[name][tuple(slice(*bounds) for bounds in region)].to(dtype))
            target = torch.full(wanted[-1].shape, 9.0, dtype=dtype, device=device)
            placements.append(Placement(stored[name], target, region))
    read: list[int] = []
    load_tensors(placements, device, read.append, piece_bytes, num_threads)
    for placement, expected in zip(placements, wanted, strict=True):
        assert torch.equal(placement.target.cpu(), expected), placement
    assert sum(read) == sum(placement.nbytes for placement in placements)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's account of what a process has read")
@pytest.mark.parametrize("region", [((256, 512), (0, 1024)), ((0, 1024), (512, 768))])
def test_nothing_but_the_part_is_read(tmp_path: Path, region: Region) -> None:
    save_file({"matrix": torch.randn(1024, 1024)}, tmp_path / "model.safetensors")
    placement = Placement(stored_tensors(tmp_path)[0], torch.empty([end - begin for begin, end in region]), region)

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = bytes_read()
    load_tensors([placement], torch.device("cpu"))
    assert 2**20 <= bytes_read() - before < 2**20 + 2**16


def test_a_file_that_shrinks_meanwhile_is_named_with_the_tensor(folder: Path, device: torch.device) -> None:
    stored = by_name(folder)
    last = max(stored.values(), key=lambda tensor: tensor.offset)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: last.offset + 8])
    placements = [Placement(tensor, torch.empty(tensor.shape, device=device)) for tensor in stored.values()]
    with pytest.raises(CheckpointError, match=f"tensor {last.name} cannot be read: the file ends") as error:
        load_tensors(placements, device, piece_bytes=64, num_threads=3)
    assert str(file) in str(error.value)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be opened: No such file"):
        load_tensors(placements, device)


def test_the_bytes_of_a_model_are_known_before_it_is_loaded(tiny_checkpoint: Callable[..., Path]) -> None:
    model = load_model(tiny_checkpoint("llama"), dtype="float32", load_format="dummy")
    weights = sum(stored.nbytes for stored in stored_tensors(tiny_checkpoint("llama")))
    assert model_bytes(type(model), model.config, torch.float32) == weights
    assert model_bytes(type(model), model.config, torch.bfloat16) * 2 == weights


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_gpu_gets_the_weights_that_a_cpu_gets(tiny_checkpoint: Callable[..., Path], family: str) -> None:
    checkpoint = tiny_checkpoint(family)
    there = load_model(checkpoint, dtype="bfloat16", device="cuda")
    parameters = dict(there.named_parameters())
    for name, parameter in load_model_unpacked(checkpoint).items():
        assert torch.equal(parameters[name].cpu(), parameter), name


def load_model_unpacked(checkpoint: Path) -> dict[str, torch.Tensor]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        return dict(load_model(checkpoint, dtype="bfloat16").named_parameters())

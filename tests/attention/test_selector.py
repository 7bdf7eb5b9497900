from __future__ import annotations

import pytest
import torch

from attention.backend import AttentionSpec
from attention.errors import AttentionBackendError
from attention.registry import BACKENDS, get_backend
from attention.selector import force_attn_backend, select_backend

CPU = torch.device("cpu")
SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=16, scale=0.25)


def test_the_cpu_default() -> None:
    selection = select_backend(CPU, torch.float32, SPEC, 16)
    assert selection.backend.name == "CPU_ATTN"
    assert selection.reasons == {"CPU_ATTN": [], "TORCH_SDPA": []}


def test_configuration_beats_priority_and_code_beats_configuration() -> None:
    assert select_backend(CPU, torch.float32, SPEC, 16, forced="TORCH_SDPA").backend.name == "TORCH_SDPA"
    with force_attn_backend("CPU_ATTN"):
        assert select_backend(CPU, torch.float32, SPEC, 16, forced="TORCH_SDPA").backend.name == "CPU_ATTN"
    assert select_backend(CPU, torch.float32, SPEC, 16, forced="TORCH_SDPA").backend.name == "TORCH_SDPA"


def test_an_unknown_name_lists_the_right_ones_and_the_nearest() -> None:
    with pytest.raises(
        AttentionBackendError, match=r"unknown attention backend 'torch_spda'.*did you mean TORCH_SDPA\?"
    ) as e:
        select_backend(CPU, torch.float32, SPEC, 16, forced="torch_spda")
    assert all(name in str(e.value) for name in BACKENDS)
    with pytest.raises(AttentionBackendError, match="unknown"), force_attn_backend("nothing like it"):
        pass


def test_a_forced_backend_that_refuses_says_why() -> None:
    with pytest.raises(AttentionBackendError, match=r"TORCH_SDPA.*not on cuda"):
        select_backend(torch.device("cuda"), torch.float32, SPEC, 16, forced="TORCH_SDPA")


def test_nothing_usable_gives_every_reason() -> None:
    with pytest.raises(AttentionBackendError, match=r"CPU_ATTN: .*int8.*TORCH_SDPA: .*int8"):
        select_backend(CPU, torch.int8, SPEC, 16)
    with pytest.raises(AttentionBackendError, match="none is made for it"):
        select_backend(torch.device("meta"), torch.float32, SPEC, 16)


def test_every_kind_of_layer_must_be_accepted() -> None:
    bad = AttentionSpec(num_heads=3, num_kv_heads=2, head_size=16, scale=0.25)
    with pytest.raises(AttentionBackendError, match="3 query heads do not divide among 2"):
        select_backend(CPU, torch.float32, [SPEC, bad], 16)


def test_a_backend_whose_library_is_missing_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention.registry.BACKENDS", {**BACKENDS, "CPU_ATTN": "attention.backends.absent:Nothing"})
    selection = select_backend(CPU, torch.float32, SPEC, 16)
    assert selection.backend.name == "TORCH_SDPA"
    assert "cannot be loaded" in selection.reasons["CPU_ATTN"][0]


@pytest.mark.parametrize("name", BACKENDS)
def test_names_agree(name: str) -> None:
    assert get_backend(name).name == name

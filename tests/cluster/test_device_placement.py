"""Which devices the workers get, and how they share them."""

from __future__ import annotations

import pytest

from cluster.config.load import load_config
from cluster.device_placement import Placement, place_groups
from workers.errors import ConfigError


def placed(gpus: float | None, **settings: object) -> tuple[Placement, ...]:
    overrides = {key.replace("__", "."): value for key, value in settings.items()}
    return tuple(place_groups(load_config(environ={}, overrides=overrides), gpus).values())


def test_without_gpus_everything_is_on_the_cpu() -> None:
    for gpus in (None, 0.0, 0.5):
        assert placed(gpus) == (Placement("cpu", 0.0, 0.9, 16),) * 2


def test_a_gpu_each_where_there_are_enough() -> None:
    assert placed(2.0) == placed(8.0) == (Placement("cuda", 1.0, 0.9, 64),) * 2


@pytest.mark.parametrize(
    ("gpus", "prefill", "decode", "part"),
    [(1.0, 1, 1, 0.5), (2.0, 2, 1, 0.5), (2.0, 2, 2, 0.5), (1.0, 2, 1, 0.3333), (3.0, 2, 3, 0.5), (2.0, 4, 2, 0.3333)],
)
def test_too_few_gpus_are_shared_with_their_memory(gpus: float, prefill: int, decode: int, part: float) -> None:
    for place in placed(gpus, prefill__replicas=prefill, decode__replicas=decode):
        assert (place.device, place.num_gpus, place.block_size) == ("cuda", part, 64)
        assert place.gpu_memory_utilization == pytest.approx(0.9 * part)
    per_gpu = int(1 / part)
    assert per_gpu * int(gpus) >= prefill + decode


def test_what_is_set_is_kept() -> None:
    prefill, decode = placed(
        1.0,
        prefill__num_gpus=0.5,
        decode__num_gpus=0.5,
        decode__gpu_memory_utilization=0.3,
        prefill__block_size=128,
    )
    assert prefill == Placement("cuda", 0.5, 0.45, 128)
    assert decode == Placement("cuda", 0.5, 0.3, 64)


@pytest.mark.parametrize("gpus", [0.0, 1.0, 3.0])
def test_a_share_that_is_set_and_not_there_is_refused(gpus: float) -> None:
    with pytest.raises(ConfigError, match=rf"the workers need 4 GPUs, the Ray cluster has {gpus:g}"):
        placed(gpus, prefill__num_gpus=2, decode__num_gpus=2)


def test_a_share_that_is_set_leaves_the_rest_to_the_others() -> None:
    prefill, decode = placed(2.0, prefill__num_gpus=1)
    assert (prefill.num_gpus, decode.num_gpus, decode.device) == (1.0, 1.0, "cuda")


def test_a_pool_may_be_kept_from_the_gpus() -> None:
    prefill, decode = placed(1.0, prefill__device="cpu")
    assert prefill == Placement("cpu", 0.0, 0.9, 16)
    assert decode == Placement("cuda", 1.0, 0.9, 16)  # blocks travel as they are: one size for both


def test_a_pool_that_must_have_gpus_gets_them_first() -> None:
    prefill, decode = placed(2.0, prefill__device="cuda", prefill__num_gpus=2)
    assert (prefill.device, prefill.num_gpus) == ("cuda", 2.0)
    assert (decode.device, decode.num_gpus) == ("cpu", 0.0)


@pytest.mark.parametrize(("gpus", "text"), [(0.0, "need 4 GPUs, the Ray cluster has 0"), (3.0, "need 4 .* has 3")])
def test_gpus_that_must_be_there_and_are_not(gpus: float, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        placed(gpus, prefill__device="cuda", decode__device="cuda", prefill__num_gpus=2, decode__num_gpus=2)


def test_in_one_process_the_gpu_is_taken_only_when_told() -> None:
    prefill, decode = placed(None, prefill__device="cuda", decode__device="cuda")
    assert (prefill.device, decode.device) == ("cuda", "cuda")
    assert prefill.gpu_memory_utilization + decode.gpu_memory_utilization == pytest.approx(0.9)


def test_every_rank_gets_a_gpu() -> None:
    settings = {"prefill__tensor_parallel_size": 2, "decode__tensor_parallel_size": 2}
    assert placed(4.0, **settings) == (Placement("cuda", 1.0, 0.9, 64),) * 2
    assert placed(0.0, **settings) == (Placement("cpu", 0.0, 0.9, 16),) * 2


def test_each_group_is_placed_by_its_own_settings() -> None:
    groups = {"h100": {"device": "cuda", "replicas": 2}, "cpu": {"device": "cpu", "block_size": 16}}
    _, h100, cpu = placed(3.0, decode__groups=groups)
    assert h100 == Placement("cuda", 1.0, 0.9, 16), "blocks travel as they are: one size where nobody says otherwise"
    assert cpu == Placement("cpu", 0.0, 0.9, 16)
    assert placed(1.0, decode__groups=groups)[1].num_gpus == 0.3333
    with pytest.raises(ConfigError, match=r"1 × 1 for prefill and 1 × 2 for decode\.a and 3 × 1 for decode\.b"):
        placed(4.0, decode__groups={"a": {"tensor_parallel_size": 2}, "b": {"replicas": 3}})


def test_a_group_without_workers_takes_no_share() -> None:
    later = {"now": {}, "later": {"replicas": 0}}
    assert [place.num_gpus for place in placed(2.0, decode__groups=later)] == [1.0, 1.0, 1.0]
    assert [place.device for place in placed(0.0, decode__groups=later)] == ["cpu"] * 3
    prefill, decode = placed(1.0, prefill__replicas=0, prefill__device="cpu", router__disaggregation="never")
    assert (decode.num_gpus, decode.block_size, prefill.device) == (1.0, 64, "cpu")


def test_ranks_share_gpus_only_where_each_worker_has_one_on_every_gpu() -> None:
    """Ray might put two ranks of one worker on the same GPU, so here each rank has its number's."""
    for prefill in placed(2.0, prefill__tensor_parallel_size=2, decode__tensor_parallel_size=2):
        assert (prefill.device, prefill.num_gpus, prefill.gpu_by_rank) == ("cuda", 0.5, True)
        assert prefill.gpu_memory_utilization == pytest.approx(0.45)
    assert not placed(1.0)[0].gpu_by_rank


@pytest.mark.parametrize(
    ("gpus", "settings", "needed"),
    [
        (3.0, {"prefill__tensor_parallel_size": 2, "decode__tensor_parallel_size": 2}, 4),
        (4.0, {"prefill__tensor_parallel_size": 2, "decode__tensor_parallel_size": 2, "decode__replicas": 2}, 6),
        (1.0, {"decode__tensor_parallel_size": 2}, 3),
        (4.0, {"prefill__tensor_parallel_size": 4, "decode__tensor_parallel_size": 4, "decode__num_gpus": 1}, 8),
    ],
)
def test_too_few_gpus_for_the_ranks_are_an_error_not_a_cpu(gpus: float, settings: dict[str, int], needed: int) -> None:
    with pytest.raises(ConfigError, match=f"ranks need {needed} GPUs .* the Ray cluster has {gpus:g}"):
        placed(gpus, **settings)

"""Who needs blocks that are in quarantine, and will have no room without them, goes elsewhere; others go on."""

from __future__ import annotations

import pytest

from local_cluster import LocalCluster
from workers.errors import RoomLostError
from workers.sampling_params import SamplingParams
from workers.scheduling.lost_room import ROOM_PATIENCE_S


def greedy(max_tokens: int, **others) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "seed": 0, "max_tokens": max_tokens, "ignore_eos": True, **others})


def quarantine_at_decode(cluster: LocalCluster, num_tokens: int) -> None:
    """The decode worker has given up a living prefill worker, the last one, which may write to a prompt's blocks."""
    lost = list(cluster.prefill)[-1]
    silent = cluster.prefill.pop(lost)
    (decode,) = cluster.decode.values()
    cluster.prefill[lost] = silent
    cluster.submit("quarantined", [5] * num_tokens, greedy(1), prefill=len(cluster.prefill) - 1)
    del cluster.prefill[lost]
    silent.abort("quarantined")  # it takes no step any more
    for _ in range(5):
        cluster.step()
    decode.disconnect(lost)
    for _ in range(5):
        cluster.step()
    assert decode.load.quarantined_blocks == -(-num_tokens // 16)
    assert cluster.failures.pop("quarantined")
    cluster.lost = lost


def settle(cluster: LocalCluster, steps: int = 300) -> None:
    for _ in range(steps):
        cluster.step()


@pytest.fixture
def cluster(tiny_checkpoint, local_cluster, clock) -> LocalCluster:
    """A decode worker of ten blocks, of which four are in quarantine."""
    made = local_cluster(
        tiny_checkpoint("llama"), num_prefill=2, decode_blocks=10, max_model_len=160, decode_batched_tokens=64
    )
    quarantine_at_decode(made, 64)
    return made


def sent_away(cluster: LocalCluster, clock, *names: str) -> None:
    """They have waited in vain for as long as quarantine may take to end, and not a moment less."""
    settle(cluster)
    clock.now += 0.9 * ROOM_PATIENCE_S
    settle(cluster, 5)
    assert not cluster.failures
    clock.now += 0.2 * ROOM_PATIENCE_S
    settle(cluster, 5)
    assert set(cluster.failures) == set(names)
    for error in cluster.failures.values():
        assert isinstance(error, RoomLostError)
        assert "4 of its 10 KV blocks may still be written to" in str(error)


def test_a_sequence_that_grows_beyond_what_is_left_goes_elsewhere(cluster, clock, reference_greedy, tiny_checkpoint):
    cluster.submit("long", [7] * 60, greedy(60))
    cluster.submit("short", [9] * 20, greedy(8))
    sent_away(cluster, clock, "long")
    assert "long" in cluster.preempted
    before = len(cluster.token_ids("long"))
    assert cluster.token_ids("long") == reference_greedy(tiny_checkpoint("llama"), [7] * 60, 60)[:before]
    settle(cluster)
    assert cluster.token_ids("short") == reference_greedy(tiny_checkpoint("llama"), [9] * 20, 8), "it was behind"


def test_one_of_several_samples_that_has_no_room_ends_the_attempt(cluster, clock):
    cluster.submit("three", [7] * 60, greedy(60, n=3, temperature=1.0))
    sent_away(cluster, clock, "three")
    (decode,) = cluster.decode.values()
    assert decode.load.free_blocks == 6
    assert not decode.load.preempted


@pytest.mark.parametrize("where", ["elsewhere", "here"])
def test_a_prompt_that_waits_for_more_than_is_left_goes_elsewhere(where, cluster, clock):
    submit = cluster.submit if where == "elsewhere" else cluster.submit_local
    submit("long", [7] * 110, greedy(4))
    submit("short", [9] * 20, greedy(4))
    sent_away(cluster, clock, "long")
    settle(cluster)
    assert len(cluster.token_ids("short")) == 4


def test_whoever_fits_into_what_is_left_waits_for_its_turn(cluster, clock):
    cluster.submit("first", [7] * 60, greedy(30))
    cluster.submit("second", [9] * 60, greedy(30))
    settle(cluster, 20)
    clock.now += 2 * ROOM_PATIENCE_S
    settle(cluster)
    assert not cluster.failures
    assert [len(cluster.token_ids(name)) for name in ("first", "second")] == [30, 30]


def test_a_quarantine_that_ends_in_time_costs_nobody_anything(cluster, clock, reference_greedy, tiny_checkpoint):
    cluster.submit("long", [7] * 60, greedy(60))
    settle(cluster)
    clock.now += 0.9 * ROOM_PATIENCE_S
    settle(cluster, 5)
    (decode,) = cluster.decode.values()
    decode.disconnect(cluster.lost, confirmed_dead=True)
    settle(cluster)
    clock.now += ROOM_PATIENCE_S
    settle(cluster, 5)
    assert not cluster.failures
    assert cluster.token_ids("long") == reference_greedy(tiny_checkpoint("llama"), [7] * 60, 60)


def test_a_prompt_that_waits_for_blocks_that_a_stuck_write_reads_goes_elsewhere(tiny_checkpoint, local_cluster, clock):
    """The decode worker takes no step, so nothing lands there."""
    cluster = local_cluster(tiny_checkpoint("llama"), prefill_blocks=10, max_model_len=160)
    (prefill,), (stuck,) = cluster.prefill.values(), cluster.decode.values()
    cluster.submit("a", [5] * 64, greedy(4))
    for _ in range(3):
        stuck.step()
    for _ in range(5):
        prefill.step()
    prefill.abort("a")
    for _ in range(5):
        prefill.step()
    assert prefill.load.quarantined_blocks == 4
    cluster.submit("long", [7] * 110, greedy(4))
    cluster.submit("short", [9] * 20, greedy(1))
    failed = {}
    for elapsed in (0.0, 0.9, 0.2):
        assert not failed
        clock.now += elapsed * ROOM_PATIENCE_S
        for _ in range(5):
            events = prefill.step()
            failed |= {event.request_id: event.error for event in events if hasattr(event, "error")}
    assert list(failed) == ["long"]
    assert isinstance(failed["long"], RoomLostError)
    cluster.abort("long")
    cluster.run()
    cluster.assert_all_blocks_free()

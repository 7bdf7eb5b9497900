"""The mechanisms behind the promises of docs/guarantees.md, each with the change that switches it off.

The test that is named fails with that change, and passes without it: see `benchmarks.switched_off`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Switch:
    """A mechanism, and how it is switched off.

    Attributes:
        name: in docs/guarantees.md.
        file: that has it, from the repository's root.
        on: a piece of the file's text; stands there once.
        off: what takes its place.
        test: file and function of the test that fails then.
    """

    name: str
    file: str
    on: str
    off: str
    test: str


_HANDOFF, _TRANSPORTS = "kv_transfer/handoff", "kv_transfer/transports"
_IN_HANDOFF, _IN_POOLS = "tests/kv_transfer/handoff", "tests/cluster/pools"

SWITCHES = (
    # nothing wrong
    Switch(
        "counted",
        f"{_HANDOFF}/part_counter.py",
        "len(self._indices) < final.num_parts or any(missing > 0 for missing in self._missing)",
        "False",
        "tests/workers/test_faults.py::test_a_dropped_part_ends_in_an_error_never_in_text",
    ),
    Switch(
        "reservation",
        f"{_HANDOFF}/receiver.py",
        "if handoff is None or handoff.peer != sender:",
        "if handoff is None:",
        f"{_IN_HANDOFF}/test_protocol.py::test_stale_and_foreign_messages_count_for_nothing",
    ),
    Switch(
        "identity",
        "cluster/pools/pinned_identity.py",
        "        if differences:",
        "        if False:",
        f"{_IN_POOLS}/test_other_weights.py::test_a_successor_with_other_weights_is_not_let_in",
    ),
    Switch(
        "tokenizer",
        "cluster/pools/pinned_identity.py",
        "if self._tokenizer is not None and any(",
        "if False and any(",
        f"{_IN_POOLS}/test_other_weights.py::test_a_worker_with_another_tokenizer_than_the_gateway_is_not_let_in",
    ),
    Switch(
        "hash salt",
        "cluster/gateway/engine.py",
        "return replace(request, cache_salt=self.cache_identity + request.cache_salt)",
        "return request",
        f"{_IN_POOLS}/test_other_weights.py::test_blocks_are_known_by_whose_they_are",
    ),
    Switch(
        "fence",
        f"{_TRANSPORTS}/local.py",
        "return reaches and not confirmed_dead and self._fabric.runs(engine_id)",
        "return False",
        f"{_IN_HANDOFF}/test_fence.py::test_a_living_peer_that_was_given_up_still_writes_and_its_blocks_stay_out",
    ),
    Switch(
        "fence over NIXL",
        f"{_TRANSPORTS}/nixl.py",
        "        return runs\n\n    @property",
        "        return False\n\n    @property",
        "tests/kv_transfer/transports/test_nixl_endpoints.py::test_within_a_machine_blocks_stay_out_until_the_process_is_gone",
    ),
    Switch(
        "bounded posts",
        f"{_HANDOFF}/sender.py",
        "for piece in part.pieces(limit):",
        "for piece in part.pieces(limit * 10**9):",
        f"{_IN_HANDOFF}/test_bounded_posts.py::test_a_handoff_in_pieces_arrives_whole",
    ),
    Switch(
        "asked entries",
        f"{_TRANSPORTS}/nixl_endpoint.py",
        "        self._guard()\n        with contextlib.suppress(Exception):\n            handle.release()",
        "        with contextlib.suppress(Exception):\n            handle.release()",
        "tests/kv_transfer/transports/test_guarded_entries.py::test_every_entry_is_asked_for",
    ),
    Switch(
        "confirmed ends",
        "cluster/ray/worker.py",
        "return stopped or await self.has_ended()",
        "return True",
        "tests/cluster/ray/test_process_end.py::test_what_stopping_says",
    ),
    Switch(
        "certain ends",
        "cluster/ray/process_end.py",
        "    process.kill(ProcessId.own())\n",
        "",
        "tests/cluster/ray/test_process_end.py::test_a_frozen_process_is_ended_and_never_a_later_one_of_its_number",
    ),
    # nothing stuck
    Switch(
        "ends asked for again",
        "cluster/pools/burials.py",
        "        if not confirmed:",
        "        if False:",
        f"{_IN_POOLS}/test_liveness.py::test_an_end_that_nobody_could_confirm_is_asked_for_again",
    ),
    Switch(
        "cancel until closed",
        f"{_HANDOFF}/receiver.py",
        "handoff.cancel_at = time.monotonic() + patience_s",
        "handoff.cancel_at = math.inf",
        f"{_IN_HANDOFF}/test_reconnect.py::test_a_cancel_is_repeated_until_it_is_confirmed",
    ),
    Switch(
        "new handshake",
        "cluster/pools/handshake.py",
        "for engine_id, endpoint in peers.items():",
        "for engine_id, endpoint in ():",
        "tests/cluster/gateway/test_broken_pairs.py::test_a_broken_pair_is_met_anew_and_serves_again",
    ),
    Switch(
        "broken followers",
        "workers/lockstep/lead.py",
        "return {**self._pulses.broken_peers, **self._replica.worker.broken_peers}",
        "return self._replica.worker.broken_peers",
        "tests/workers/lockstep/test_pulse.py::test_a_connection_that_breaks_on_a_follower_is_known_to_the_lead",
    ),
    Switch(
        "lost room",
        "workers/scheduling/lost_room.py",
        "            if now - since >= self._patience_s:",
        "            if False:",
        "tests/workers/test_quarantine.py::test_a_sequence_that_grows_beyond_what_is_left_goes_elsewhere",
    ),
    Switch(
        "moved for room",
        "cluster/gateway/request.py",
        "except (WorkerLostError, HandoffError, RoomLostError) as error:",
        "except (WorkerLostError, HandoffError) as error:",
        "tests/cluster/gateway/test_lost_room.py::test_it_goes_on_where_there_is_room_without_a_seam",
    ),
    Switch(
        "silence",
        "cluster/pools/listening.py",
        "silent = 0 if heard != last else silent + 1",
        "silent = 0",
        "tests/cluster/gateway/test_engine.py::test_a_worker_that_falls_silent_is_lost_and_others_do_its_work",
    ),
    Switch(
        "stalled",
        "cluster/pools/listening.py",
        '        replica.state = "stalled" if stalled else "ready"',
        '        replica.state = "ready"',
        f"{_IN_POOLS}/test_liveness.py::test_a_step_that_takes_long_keeps_requests_away_until_it_ends",
    ),
    Switch(
        "stuck",
        "cluster/pools/listening.py",
        "    if heartbeat.step_s >= patience.stuck_after_s(info):",
        "    if False:",
        f"{_IN_POOLS}/test_liveness.py::test_a_step_that_does_not_end_costs_its_worker",
    ),
    Switch(
        "frozen rank",
        "cluster/pools/listening.py",
        "    if heartbeat.silent_ranks:",
        "    if False:",
        f"{_IN_POOLS}/test_liveness.py::test_a_frozen_rank_costs_its_worker_and_is_no_requests_doing",
    ),
    Switch(
        "pulse",
        "workers/lockstep/lead.py",
        "            self._report(Pulse(self._connector.broken_peers))\n",
        "            pass\n",
        "tests/workers/lockstep/test_pulse.py::test_a_follower_is_heard_while_its_step_hangs",
    ),
    Switch(
        "watched starts",
        "cluster/pools/start_watch.py",
        "            await self._watch(starting, told, limit_s)",
        "            await asyncio.wait({starting})",
        f"{_IN_POOLS}/test_liveness.py::test_a_worker_that_freezes_before_it_serves_is_replaced",
    ),
    Switch(
        "heard while it meets",
        "cluster/pools/supervisor.py",
        "            await asyncio.wait({meeting, listening}, return_when=asyncio.FIRST_COMPLETED)",
        "            await asyncio.wait({meeting})",
        f"{_IN_POOLS}/test_liveness.py::test_a_worker_that_freezes_before_it_serves_is_replaced",
    ),
    Switch(
        "deadlines on workers",
        "workers/decode_worker.py",
        "        for sequences in self._sequences.overdue(self._clock()):",
        "        for sequences in ():",
        "tests/workers/test_decode_worker.py::test_the_deadline_passes",
    ),
    Switch(
        "growth past what is stuck",
        "cluster/autoscaling/policy.py",
        "        if signals.ready + stuck < target:",
        "        if signals.ready < target:",
        "tests/cluster/autoscaling/test_policy.py::test_a_place_that_never_starts_holds_up_nothing",
    ),
    # nobody hurt by anybody else
    Switch(
        "suspects",
        "cluster/gateway/suspects.py",
        "self._crashes[key] = (2 if in_its_turn else max(self._count(key), 1), self._clock())",
        "self._crashes[key] = (0, self._clock())",
        "tests/cluster/gateway/test_suspects.py::test_a_poisoned_request_ends_two_workers_and_nobody_elses_answer",
    ),
)

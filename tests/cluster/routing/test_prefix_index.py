"""The gateway knows what the prefill workers have cached, and sends a prompt where most of it is, if that pays."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from cluster.routing.load_tracker import LoadTracker
from cluster.routing.prefix_index import PrefixIndex, PromptPrefix
from cluster.routing.router import Placement, RoutingRequest
from cluster.routing.worker_table import WorkerTable, WorkerTraits
from local_cluster import LocalCluster
from made_requests import worker_request
from workers.block_hashes import block_hashes
from workers.commands import Alone
from workers.messages import CacheUpdate, PrefillReport
from workers.runner.step_times import StepTimes
from workers.sampling_params import SamplingParams

CAPABILITY = StepTimes(prefill=((16, 0.016), (1600, 1.6)), decode=((1, 0.01), (16, 0.02)))
PROMPT = tuple(range(1000))


def traits(engine_id: str, block_size: int = 16, step_times: StepTimes = CAPABILITY) -> WorkerTraits:
    return WorkerTraits(engine_id, 4096, block_size, 1000, 8, step_times)


def load_tracker(*prefill: WorkerTraits) -> LoadTracker:
    made = LoadTracker()
    made.update_pools(dict.fromkeys(prefill, True), {traits("d"): True}, {})
    return made


def stores(made: LoadTracker, engine_id: str, num_tokens: int, block_size: int = 16) -> None:
    made.cache_update(engine_id, CacheUpdate(block_hashes(PROMPT[:num_tokens], block_size), ()))


def placed(made: LoadTracker, num_tokens: int = 1000) -> Placement:
    placement = made.place(RoutingRequest(num_tokens, 10, prefix=PromptPrefix(PROMPT[:num_tokens])))
    assert isinstance(placement, Placement)
    return placement


def test_a_prompt_goes_where_it_is_cached():
    made = load_tracker(traits("p-0"), traits("p-1"), traits("p-2"))
    stores(made, "p-1", 320)
    stores(made, "p-2", 800)
    assert placed(made) == Placement("p-2", "d", pytest.approx(0.2), 0.01, 800)
    assert placed(made, 320) == Placement("p-1", "d", pytest.approx(0.016), 0.01, 304), "one block is always computed"
    assert placed(made, 16).cached_tokens == 0


def test_a_long_queue_outweighs_what_is_cached():
    made = load_tracker(traits("p-0"), traits("p-1"))
    stores(made, "p-1", 320)
    made.reserve("r", "p-1", "d", 300)
    assert placed(made).prefill == "p-1", "0.3 s before it, and 0.32 s saved"
    made.reserve("s", "p-1", "d", 100)
    assert placed(made).prefill == "p-0"


def test_only_what_is_missing_is_booked():
    made = load_tracker(traits("p-0"))
    made.reserve("r", "p-0", "d", 1000, cached_tokens=800)
    (report,) = made.explain(RoutingRequest(100, 10))
    assert report.ttft_s == pytest.approx(0.2 + 0.1)
    made.first_token("r")
    (report,) = made.explain(RoutingRequest(100, 10))
    assert report.ttft_s == pytest.approx(0.1)


def test_the_rest_of_a_prompt_takes_no_less_than_a_prompt_of_its_length():
    """Launching takes what it takes; and a late token attends to all before it, which a short prompt's does not."""
    flat = StepTimes(prefill=((16, 0.1), (512, 0.1), (1024, 0.1), (2048, 0.4)))
    table = WorkerTable()
    table.add(traits("p", step_times=flat))
    assert table.prefill_seconds_of("p", 1024, 512) == pytest.approx(0.1)
    assert table.prefill_seconds_of("p", 2048, 1024) == pytest.approx(0.3)
    assert table.prefill_seconds_of("p", 2048) == pytest.approx(0.4)


def test_the_explanation_says_what_is_cached():
    made = load_tracker(traits("p-0"), traits("p-1", 32))
    stores(made, "p-0", 320)
    stores(made, "p-1", 500, 32)
    reports = made.explain(RoutingRequest(1000, 10, prefix=PromptPrefix(PROMPT)))
    assert [(r.prefill, r.cached_tokens, r.chosen) for r in reports] == [("p-1", 480, True), ("p-0", 320, False)]
    assert reports[0].ttft_s == pytest.approx(0.52)


def test_a_worker_that_is_gone_holds_nothing():
    made = load_tracker(traits("p-0"), traits("p-1"))
    stores(made, "p-0", 320)
    made.update_pools({traits("p-1"): True, traits("p-2"): True}, {traits("d"): True}, {})
    assert placed(made).cached_tokens == 0
    stores(made, "p-0", 320)
    assert placed(made).cached_tokens == 0, "what it said last comes too late"
    stores(made, "p-2", 160)
    assert placed(made).prefill == "p-2"


def test_what_a_worker_says_that_is_gone_is_not_kept():
    index, stored = PrefixIndex(), block_hashes(PROMPT[:320], 16)
    index.add("p", 16)
    index.update("p", stored, ())
    assert len(index) == 20
    index.remove("p")
    index.update("p", stored, ())
    assert len(index) == 0


@pytest.mark.parametrize("prepared", [(), (16,), (7, 16)])
def test_a_prompt_goes_on_with_its_output(prepared):
    """What was hashed is not hashed again, and hashes are those of a prompt that had it all from the beginning."""
    prefix = PromptPrefix(PROMPT[:330])
    prefix.prepare(prepared)
    longer = prefix.followed_by(PROMPT[330:340])
    longest = longer.followed_by(PROMPT[340:700])
    for block_size in (16, 7):
        for given, length in ((longest, 700), (prefix, 330), (longer, 340)):
            hashes = block_hashes(PROMPT[:length], block_size)
            assert given.hashes(block_size) == hashes[: (length - 1) // block_size]


def test_what_decode_workers_have_is_told_apart_from_what_prefill_workers_have():
    made = load_tracker(traits("p-0"))
    stores(made, "d", 320)
    (report,) = made.explain(RoutingRequest(1000, 10, prefix=PromptPrefix(PROMPT)))
    assert (report.cached_tokens, report.decode_cached_tokens) == (0, 320)
    assert made.block_sizes == {16}


class IndexMachine(RuleBasedStateMachine):
    """Against sets of what each worker holds, looked through one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.held: dict[str, tuple[int, set[bytes]]] = {}
        self.slots: dict[str, int] = {}
        self.count = 0

    @rule(block_size=st.sampled_from([1, 2, 3]))
    def come(self, block_size: int) -> None:
        name = f"p-{self.count}"
        self.count += 1
        self.held[name] = (block_size, set())
        self.slots[name] = self.index.add(name, block_size)

    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        if self.held:
            name = data.draw(st.sampled_from(sorted(self.held)))
            del self.held[name]
            self.index.remove(name)

    @rule(data=st.data(), stored=st.text("ab", max_size=6), removed=st.text("ab", max_size=6))
    def say(self, data: st.DataObject, stored: str, removed: str) -> None:
        if self.held:
            name = data.draw(st.sampled_from(sorted(self.held)))
            block_size, held = self.held[name]
            fewer = set(block_hashes([ord(c) for c in removed], block_size)[-1:])
            more = set(block_hashes([ord(c) for c in stored], block_size)) - fewer
            self.index.update(name, more, fewer)
            self.held[name] = (block_size, (held | more) - fewer)

    @rule(text=st.text("ab", min_size=1, max_size=8))
    def ask(self, text: str) -> None:
        token_ids = [ord(c) for c in text]
        expected = {}
        for name, (block_size, held) in self.held.items():
            depth = 0
            while (depth + 1) * block_size < len(text) and block_hashes(token_ids, block_size)[depth] in held:
                depth += 1
            expected[name] = depth * block_size
        cached = self.index.cached_tokens(PromptPrefix(token_ids))
        assert {name: cached[self.slots[name]] for name in self.held} == expected
        assert len({self.slots[name] for name in self.held}) == len(self.held)

    @rule()
    def nothing_is_kept_that_nobody_holds(self) -> None:
        assert len(self.index) == len(set().union(*(held for _, held in self.held.values())))


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_a_beginning_that_the_whole_pool_holds():
    made = load_tracker(*(traits(f"p-{i}") for i in range(40)))
    for i in range(40):
        if i % 7:
            stores(made, f"p-{i}", 160)
    stores(made, "p-35", 480)
    stores(made, "p-36", 480)
    reports = made.explain(RoutingRequest(1000, 10, prefix=PromptPrefix(PROMPT)))
    assert {r.prefill: r.cached_tokens for r in reports} == {
        f"p-{i}": 480 if i in (35, 36) else 160 if i % 7 else 0 for i in range(40)
    }


def test_what_the_gateway_predicts_is_what_workers_find(tiny_checkpoint):
    """Real workers with caches so small that they evict, told of through their updates alone."""
    cluster, rng, found = LocalCluster(tiny_checkpoint("llama"), num_prefill=2, prefill_blocks=10), random.Random(0), 0
    made = load_tracker(*(traits(engine_id) for engine_id in cluster.prefill))
    family = [rng.randrange(3, 512) for _ in range(120)]
    for number in range(60):
        kept = rng.randrange(100)
        prompt = (*family[:kept], *(rng.randrange(3, 512) for _ in range(rng.randrange(1, 40))))
        engine_id = rng.choice(list(cluster.prefill))
        routing_request = RoutingRequest(len(prompt), 1, prefix=PromptPrefix(prompt))
        predicted = {report.prefill: report.cached_tokens for report in made.explain(routing_request)}[engine_id]
        sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=1)
        worker = cluster.prefill[engine_id]
        worker.add(worker_request(f"r{number}", prompt, sampling))
        (report,) = (event for event in worker.step() if isinstance(event, PrefillReport))
        assert report.cached_tokens == predicted
        found += predicted
        if update := Alone(worker).take_cache_update():
            made.cache_update(engine_id, update)
    assert found > 1000

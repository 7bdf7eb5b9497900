"""The decode batch on the device: rows follow the scheduler, steps compute what the model computes, graphs or not."""

from __future__ import annotations

import random

import pytest
import torch

from attention.kv_cache import KVCacheSpec
from attention.platform import Platform
from cache_groups import ListedTables, unwritten_caches
from long_tails import slow_unless
from workers.kv_cache.tables import BlockTable, SequenceTables
from workers.models.loader import load_model
from workers.ops.decode_input_types import PADDING_LEN
from workers.ops.decode_inputs import decode_inputs_torch, decode_slots_torch
from workers.ops.triton.decode_inputs import launch_decode_inputs, launch_decode_slots
from workers.runner.decode_batch_state import DecodeRows
from workers.runner.decode_graphs import DecodeGraphs, ladder, next_size
from workers.runner.decode_runner import DecodeRunner
from workers.runner.model_runner import ModelRunner, Row

BLOCK_SIZE = 4
MAX_BLOCKS = 6
GROUPS = [KVCacheSpec((0,), 1, 8, BLOCK_SIZE, torch.float32)]


class Stub:
    """A sequence of the test's own: knows the tokens that the host has seen, and counts those in flight."""

    def __init__(self, tokens: list[int], blocks: list[int]) -> None:
        self.tokens = tokens
        self.blocks = blocks
        self.in_flight = 0
        self.listed = ListedTables()
        self.given: SequenceTables | None = None

    @property
    def tables(self) -> SequenceTables:
        return self.given or self.listed.over(self.blocks, BLOCK_SIZE)

    @tables.setter
    def tables(self, tables: SequenceTables) -> None:
        self.given = tables

    @property
    def num_scheduled(self) -> int:
        return len(self.tokens) + self.in_flight

    @property
    def last_token(self) -> int | None:
        return None if self.in_flight else self.tokens[-1]


def check_rows(rows: DecodeRows, batch: list[Stub], device_tokens: dict[Stub, int]) -> None:
    for place, sequence in enumerate(batch):
        assert rows.tokens[place].item() == device_tokens[sequence]
        assert rows.seq_lens[place].item() == sequence.num_scheduled
        assert rows.block_tables[0][place, : len(sequence.blocks)].tolist() == sequence.blocks
    assert (rows.seq_lens[len(batch) :] == PADDING_LEN).all()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("lag", [0, 1, 2])
def test_rows_follow_any_schedule(seed, lag, device):
    """Sequences join, grow, pause, come back with other blocks and leave; the host learns tokens `lag` steps late."""
    rng = random.Random(seed)
    rows = DecodeRows(8, MAX_BLOCKS * BLOCK_SIZE, GROUPS, torch.device(device))
    alive: list[Stub] = []
    device_tokens: dict[Stub, int] = {}
    in_flight: list[dict[Stub, int]] = []
    fresh = iter(range(10_000))
    for _ in range(150):
        alive = [s for s in alive if rng.random() > 0.08 and s.num_scheduled < MAX_BLOCKS * BLOCK_SIZE]
        for _ in range(rng.randint(0, 8 - len(alive)) if rng.random() < 0.4 else 0):
            tokens = [rng.randrange(100) for _ in range(rng.randint(2, 10))]
            alive.append(Stub(tokens, []))
        for s in alive:
            if not s.in_flight and rng.random() < 0.1:  # put aside and brought back
                s.blocks = []
            missing = -(-s.num_scheduled // BLOCK_SIZE) - len(s.blocks)
            s.blocks += [next(fresh) for _ in range(missing)]
            if not s.in_flight:
                device_tokens[s] = s.tokens[-1]
        scheduled = [s for s in alive if s.in_flight or rng.random() > 0.1]
        rng.shuffle(scheduled)
        batch = rows.arrange(scheduled)
        assert sorted(map(id, batch)) == sorted(map(id, scheduled))
        check_rows(rows, batch, device_tokens)
        chosen = [rng.randrange(100) for _ in batch]
        rows.inputs(8)
        rows.tokens[: len(batch)] = torch.tensor(chosen, device=device)
        for s, token in zip(batch, chosen, strict=True):
            s.in_flight += 1
            device_tokens[s] = token
        in_flight.append(dict(zip(batch, chosen, strict=True)))
        while len(in_flight) > (lag if batch else 0):
            for s, token in in_flight.pop(0).items():
                s.in_flight -= 1
                s.tokens.append(token)


def test_a_sequence_whose_token_is_lost_is_refused():
    rows = DecodeRows(2, MAX_BLOCKS * BLOCK_SIZE, GROUPS, torch.device("cpu"))
    sequence, other = Stub([1, 2], [0]), Stub([3, 4], [1])
    rows.arrange([sequence, other])
    sequence.in_flight = 1
    rows.arrange([other])
    with pytest.raises(RuntimeError, match="left the batch and came back"):
        rows.arrange([sequence, other])


def test_inputs_of_sequences_and_of_padding(device):
    rows = DecodeRows(4, MAX_BLOCKS * BLOCK_SIZE, GROUPS, torch.device(device))
    rows.arrange([Stub([7, 8], [5]), Stub([9] * 9, [3, 1, 4])])
    inputs = rows.inputs(4)
    assert inputs.token_ids.tolist() == [8, 9, 0, 0]
    assert inputs.positions.tolist() == [1, 8, 0, 0]
    assert inputs.slot_mapping.tolist() == [5 * BLOCK_SIZE + 1, 4 * BLOCK_SIZE, -1, -1]
    assert inputs.seq_lens.tolist() == [2, 9, PADDING_LEN, PADDING_LEN]
    assert rows.seq_lens.tolist() == [3, 10, PADDING_LEN, PADDING_LEN], "the next step's"
    rows.tokens[0] = -1
    assert rows.inputs(2).token_ids.tolist() == [0, 9], "a row without a token has something to look up"


def skip_without_triton(device: str) -> None:
    if device == "cpu" and not Platform.of(device).triton_interpreter:
        pytest.skip("Triton compiles for a GPU here, and does not interpret on the CPU")


@pytest.mark.parametrize("num_rows", [1, 7, 130])
def test_the_inputs_kernel_and_its_twin_agree(num_rows, device):
    skip_without_triton(device)
    generator = torch.Generator().manual_seed(num_rows)
    tokens = torch.randint(-1, 1000, (num_rows,), generator=generator)
    lens = torch.randint(PADDING_LEN, MAX_BLOCKS * BLOCK_SIZE + 1, (num_rows,), generator=generator).int()
    tables = torch.randint(0, 2**30, (num_rows, MAX_BLOCKS), generator=generator).int()
    expected = decode_inputs_torch(tokens, expected_lens := lens.clone(), tables, BLOCK_SIZE)
    lens = lens.to(device)
    inputs = launch_decode_inputs(tokens.to(device), lens, tables.to(device), BLOCK_SIZE)
    for found, wanted in zip(inputs, expected, strict=True):
        assert torch.equal(found.cpu(), wanted)
        assert found.dtype == wanted.dtype
    assert torch.equal(lens.cpu(), expected_lens)


@pytest.mark.parametrize("num_rows", [1, 7, 130])
def test_the_slots_kernel_and_its_twin_agree(num_rows, device):
    skip_without_triton(device)
    generator = torch.Generator().manual_seed(num_rows)
    lens = torch.randint(PADDING_LEN, MAX_BLOCKS * BLOCK_SIZE + 1, (num_rows,), generator=generator).int()
    tables = torch.randint(0, 2**30, (num_rows, MAX_BLOCKS), generator=generator).int()
    expected = decode_slots_torch(lens, tables, BLOCK_SIZE)
    found = launch_decode_slots(lens.to(device), tables.to(device), BLOCK_SIZE)
    assert torch.equal(found.cpu(), expected)
    assert found.dtype == expected.dtype


def test_rows_of_several_groups(device):
    """Blocks of other sizes, and what lies behind a window is out of the row; a row that is taken over has no trace."""
    specs = [
        KVCacheSpec((0,), 1, 8, 4, torch.float32),
        KVCacheSpec((1,), 1, 8, 2, torch.float32, "sliding", 3),
    ]
    rows = DecodeRows(2, 16, specs, torch.device(device))
    whole, window = BlockTable([5, 6]), BlockTable([0, 9, 8, 7], 1)
    sequence = Stub([1] * 7, [])
    sequence.tables = tables = SequenceTables([whole, window])
    tables.num_slots = 8
    rows.arrange([sequence])
    assert [table[0].tolist() for table in rows.block_tables] == [[5, 6, 0, 0], [0, 0, 8, 7, 0, 0, 0, 0]]
    inputs = rows.inputs(2)
    assert [slots.tolist() for slots in rows.slot_mappings(inputs)] == [[6 * 4 + 2, -1], [7 * 2, -1]]
    sequence.in_flight = 2
    whole.blocks.append(4)
    window.blocks.append(3)
    tables.num_slots = 10
    rows.arrange([sequence])
    assert [table[0].tolist() for table in rows.block_tables] == [[5, 6, 4, 0], [0, 0, 0, 7, 3, 0, 0, 0]]
    newcomer = Stub([2] * 3, [])
    newcomer.tables = SequenceTables([BlockTable([1]), BlockTable([11, 12])])
    newcomer.tables.num_slots = 4
    rows.arrange([newcomer])
    assert rows.block_tables[1][0, :2].tolist() == [11, 12]


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 4, 7, 8, 9, 40, 256, 300, 1024])
def test_the_ladder_reaches_every_batch_size(max_num_seqs):
    sizes = ladder(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_num_seqs
    for size in range(1, max_num_seqs + 1):
        assert 0 <= next_size(sizes, size) - size < max(8, size // 8), "little is computed for nobody"


def test_graphs_are_captured_largest_first_and_replayed_at_the_next_size():
    ran: list[int] = []
    told: list[tuple[int, int]] = []

    def capture(work):
        ran.append(0)
        return work

    graphs = DecodeGraphs(ran.append, [1, 2, 8], lambda *progress: told.append(progress), capture)
    assert ran == [8, 0, 2, 0, 1, 0], "each size runs once before it is captured"
    assert told == [(1, 3), (2, 3), (3, 3)]
    ran.clear()
    for num_rows in (1, 2, 3, 8):
        graphs.replay(next_size(graphs.sizes, num_rows))
    assert ran == [1, 2, 8, 8]


def prompts(lengths: list[int]) -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(3, 512) for _ in range(length)] for length in lengths]


class Engine:
    """A model whose sequences are prefilled and decoded by hand."""

    def __init__(self, checkpoint, device: str, backend: str | None, **options) -> None:
        model = load_model(checkpoint, "float32", device, 16, backend)
        self.runner = ModelRunner(model, unwritten_caches(model, 64))
        self.decoder = DecodeRunner(self.runner, max_num_seqs=6, max_model_len=128, **options)
        self._free = iter(range(1, 64))

    def prefill(self, prompt: list[int]) -> Stub:
        blocks = [next(self._free) for _ in range(-(-len(prompt) // 16))]
        first = self.runner.forward([Row(prompt, 0, [blocks])]).argmax(-1).item()
        return Stub([*prompt, first], blocks)

    def step(self, sequences: list[Stub]):
        for s in sequences:
            s.blocks += [next(self._free) for _ in range(-(-s.num_scheduled // 16) - len(s.blocks))]
        launch = self.decoder.launch(sequences)
        for s in sequences:
            s.in_flight += 1
        return launch

    def take(self, launch) -> None:
        for s, token in zip(launch.sequences, launch.sampled.token_ids(), strict=True):
            s.in_flight -= 1
            s.tokens.append(token)


# On a CPU, batches run in the sizes of the ladder with the one backend that could be captured, and one by one.
MODES = ["as it comes", "in sizes", "in graphs"]


def make_engine(checkpoint, device: str, mode: str) -> Engine:
    if (mode == "in graphs") != (device == "cuda") and mode != "in sizes":
        pytest.skip(f"steps do not run {mode} on this device")
    backend = None if mode == "as it comes" else "TRITON_ATTN"
    if backend is not None:
        skip_without_triton(device)
    engine = Engine(checkpoint, device, backend, enforce_eager=mode == "in sizes")
    assert (engine.decoder.graphs is not None) == (mode == "in graphs")
    return engine


@pytest.mark.parametrize(
    ("family", "mode"),
    slow_unless(
        lambda v: v != ("llama", "in sizes"), [(family, mode) for family in ("llama", "mistral") for mode in MODES]
    ),
)
@pytest.mark.parametrize("ahead", slow_unless((1).__eq__, [0, 1]))
def test_steps_continue_a_prompt_as_transformers_does(family, mode, ahead, device, tiny_checkpoint, reference_greedy):
    checkpoint = tiny_checkpoint(family)
    engine = make_engine(checkpoint, device, mode)
    texts = prompts([3, 17, 30, 16, 1])
    sequences = [engine.prefill(prompt) for prompt in texts]
    interpreted = mode == "in sizes" and device == "cpu"
    in_flight = []
    for step in range(3 if interpreted else 20):
        # Step by step the batch shrinks and grows again: rows move, and padding comes and goes.
        batch = sequences[1:4] if step % 4 == 1 and ahead == 0 else sequences
        in_flight.append(engine.step(batch))
        while len(in_flight) > ahead:
            engine.take(in_flight.pop(0))
    for launch in in_flight:
        engine.take(launch)
    for prompt, sequence in zip(texts, sequences, strict=True):
        answer = sequence.tokens[len(prompt) :]
        assert answer == reference_greedy(checkpoint, prompt, len(answer))


@pytest.mark.parametrize("mode", MODES)
def test_logits_and_tokens_of_a_launch(mode, device, tiny_checkpoint):
    engine = make_engine(tiny_checkpoint("qwen2"), device, mode)
    sequences = [engine.prefill(prompt) for prompt in prompts([5, 20, 9])]
    rows = [Row(s.tokens[-1:], len(s.tokens) - 1, [s.blocks]) for s in sequences]
    launch = engine.step(sequences)
    expected = engine.runner.forward(rows)
    torch.testing.assert_close(launch.logits.float(), expected, rtol=1e-4, atol=1e-4)
    assert launch.sequences == sequences
    assert launch.sampled.token_ids() == expected.argmax(-1).tolist()


def test_padding_writes_nothing(device, tiny_checkpoint):
    skip_without_triton(device)
    """The cache holds what the sequences put there, and nothing else changes."""
    engine = Engine(tiny_checkpoint("llama"), device, "TRITON_ATTN")
    sequences = [engine.prefill(prompt) for prompt in prompts([5, 20, 9])]
    before = engine.runner.kv_caches[0].clone()
    engine.step(sequences)
    changed = ~(engine.runner.kv_caches[0] == before) & ~(engine.runner.kv_caches[0].isnan() & before.isnan())
    slots = {(s.blocks[(len(s.tokens) - 1) // 16], (len(s.tokens) - 1) % 16) for s in sequences}
    found = {(block, slot) for _, block, _, slot, _, _ in changed.nonzero().tolist()}
    assert found == slots


def test_a_row_without_a_token_harms_nobody(device, tiny_checkpoint, reference_greedy):
    checkpoint = tiny_checkpoint("llama")
    engine = Engine(checkpoint, device, "TRITON_ATTN" if device == "cuda" else None)
    texts = prompts([5, 20])
    broken, sound = (engine.prefill(prompt) for prompt in texts)
    engine.runner.kv_caches[0][:, broken.blocks[0], :, 2] = float("nan")
    for _ in range(3):
        engine.take(engine.step([broken, sound]))
    assert broken.tokens[-3:] == [-1, -1, -1]
    assert sound.tokens[20:] == reference_greedy(checkpoint, texts[1], 4)

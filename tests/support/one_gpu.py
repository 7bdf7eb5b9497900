"""One worker that does both: prefill and decode over one cache, with the engine's own kernels and no handoff."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from cache_groups import ListedTables, unwritten_caches
from workers.kv_cache.block_pool import blocks_for
from workers.kv_cache.tables import SequenceTables
from workers.models.causal_lm import CausalLM
from workers.runner.decode_runner import DecodeRunner
from workers.runner.model_runner import ModelRunner, Row


@dataclass(eq=False)
class Decoding:
    """A sequence, as a decode step sees it, whose tokens the host looks at after every step.

    It keeps all its blocks, and they have the same numbers in every cache group.
    """

    tokens: list[int]
    blocks: list[int]
    num_groups: int = 1
    listed: ListedTables = field(default_factory=ListedTables)

    @property
    def tables(self) -> SequenceTables:
        return self.listed.over(self.blocks, 1, self.num_groups)

    @property
    def num_scheduled(self) -> int:
        return len(self.tokens)

    @property
    def last_token(self) -> int | None:
        return self.tokens[-1]


class OneGpu:
    """Runs sequences whose blocks the caller chooses.

    Args:
        model: the decoder.
        num_blocks: of the cache, which starts as NaN.
        max_num_seqs: the largest decode batch.
        max_model_len: tokens of the longest sequence.
        longest_prefill: tokens of the longest prompt that is computed in one piece; those short enough are padded and
            run as CUDA graphs, as a prefill worker's are. None: none are.
        enforce_eager: use no CUDA graphs in decode.
        batch_sizes: see `DecodeRunner`.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        num_blocks: int,
        max_num_seqs: int,
        max_model_len: int,
        longest_prefill: int | None = None,
        enforce_eager: bool = False,
        batch_sizes: Sequence[int] | None = None,
    ) -> None:
        self.runner = ModelRunner(model, unwritten_caches(model, num_blocks))
        if longest_prefill is not None:
            self.runner.capture_prefill(longest_prefill)
        self.decoder = DecodeRunner[Decoding](
            self.runner,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            enforce_eager=enforce_eager,
            batch_sizes=batch_sizes,
        )

    def prefill(self, sequence: Decoding, chunk: int | None = None) -> torch.Tensor:
        """Compute a sequence's tokens, `chunk` at a time; (vocab,) float32 logits after the last one."""
        end, sequence.num_groups = len(sequence.tokens), len(self.runner.kv_caches)
        tables = [sequence.blocks] * sequence.num_groups
        step = chunk or end
        logits = torch.empty(0)
        for start in range(0, end, step):
            tokens = sequence.tokens[start : min(start + step, end)]
            logits = self.runner.forward([Row(tokens, start, tables, wants_logits=start + step >= end)])
        return logits[0].clone()

    def decode(self, batch: Sequence[Decoding]) -> torch.Tensor:
        """One step; each gets a token, and (n, vocab) logits come back in the order of `batch`."""
        launch = self.decoder.launch(batch)
        tokens, logits = launch.sampled.token_ids(), launch.logits.clone()
        place = {id(sequence): row for row, sequence in enumerate(launch.sequences)}
        for sequence in batch:
            sequence.tokens.append(tokens[place[id(sequence)]])
        return logits[[place[id(sequence)] for sequence in batch]]

    def greedy(self, prompt: Sequence[int], num_tokens: int, chunk: int | None = None) -> Iterator[torch.Tensor]:
        """Logits of each of so many tokens, one request alone in blocks from 0 on."""
        blocks = list(range(blocks_for(len(prompt) + num_tokens, self.runner.block_size)))
        sequence = Decoding(list(prompt), blocks)
        logits = self.prefill(sequence, chunk)
        yield logits
        sequence.tokens.append(int(logits.argmax()))
        for _ in range(num_tokens - 1):
            yield self.decode([sequence])[0]

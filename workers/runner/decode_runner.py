"""Runs decode steps: the batch stays on the device, and nothing in a step waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic

import torch

from attention.metadata import CommonAttentionMetadata
from workers.runner.decode_batch_state import DecodeRows, S
from workers.runner.decode_graphs import DecodeGraphs, Progress, ladder, next_size
from workers.runner.model_runner import ModelRunner
from workers.sampling.ops.greedy import greedy_sample
from workers.sampling.results import SampledBatch
from workers.sampling.rows import SamplingRows
from workers.sampling.state import SamplingState
from workers.sampling.warm_up import warm_up_sampling


class Launch(Generic[S]):
    """A step that is queued, or running, or done.

    Attributes:
        sequences: its batch, in the order of its rows.
        logits: (n, vocab) in the model's dtype, good until the next launch.

    Args:
        sequences: see above.
        logits: see above.
        choose: queues the choice of the tokens, and their way to the host.
    """

    def __init__(self, sequences: list[S], logits: torch.Tensor, choose: Callable[[], SampledBatch]) -> None:
        self.sequences = sequences
        self.logits = logits
        self._choose = choose
        self._sampled: SampledBatch | None = None

    @property
    def chosen(self) -> bool:
        """Whether the choice of its tokens is queued."""
        return self._sampled is not None

    @property
    def sampled(self) -> SampledBatch:
        """The token of each row, and what else it asks for, on the way to the host.

        Queues their choice if that is not done: the tokens before them must be known then, see `DecodeRunner.launch`.
        """
        if self._sampled is None:
            self._sampled = self._choose()
        return self._sampled


class DecodeRunner(Generic[S]):
    """One token for every sequence of a batch, at every launch.

    The token that is chosen for a row is the row's next input, on the device. Where the backend's decode can be
    replayed, steps run in the batch sizes of a ladder, on a GPU as CUDA graphs. A step ends with the most likely token
    of each row; where rows ask for more, a few kernels behind it choose again for these.

    Args:
        runner: the model and its cache.
        max_num_seqs: sequences in a batch.
        max_model_len: tokens of the longest sequence.
        state_of: a sequence as the sampler sees it; None: every token is the most likely one.
        enforce_eager: capture no graphs; the same kernels run one by one, and the results are the same.
        batch_sizes: of the ladder, ascending, up to `max_num_seqs`; None: see `ladder`.
        progress: told how far capturing is.
    """

    def __init__(
        self,
        runner: ModelRunner,
        *,
        max_num_seqs: int,
        max_model_len: int,
        state_of: Callable[[S], SamplingState] | None = None,
        enforce_eager: bool = False,
        batch_sizes: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._model = runner.model
        self._kv_caches = runner.kv_caches
        self.groups = runner.groups
        self._max_model_len = max_model_len
        self._rows = DecodeRows[S](max_num_seqs, max_model_len, runner.groups, runner.device)
        self._cu_seqlens_q = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=runner.device)
        sizes = ladder(max_num_seqs) if batch_sizes is None else list(batch_sizes)
        self._sizes = sizes if self._model.decodes_in_graphs else None
        self._logits = torch.empty(
            max_num_seqs if self._sizes else 0,
            self._model.config.vocab_size,
            dtype=self._model.dtype,
            device=runner.device,
        )
        self._sampling: SamplingRows[S] | None = None
        if state_of is not None:
            vocab_size = self._model.config.vocab_size
            self._sampling = SamplingRows(max_num_seqs, vocab_size, state_of, runner.device)
            warm_up_sampling(vocab_size, self._model.dtype, runner.device)
        self._unchosen: Launch[S] | None = None
        self._graphs: DecodeGraphs | None = None
        if self._sizes and runner.device.type == "cuda" and not enforce_eager:
            self._graphs = DecodeGraphs(self._padded_step, self._sizes, progress)

    @property
    def graphs(self) -> DecodeGraphs | None:
        """The captured steps; None: steps run operator by operator."""
        return self._graphs

    @torch.inference_mode()
    def launch(self, sequences: Sequence[S]) -> Launch[S]:
        """Queue the next token of each sequence; each has a block for it.

        A sequence that was in the last launch goes on with the token chosen there.

        The choice is queued behind the forward pass, unless it depends on tokens in flight, as under a grammar: then it
        is left to the caller to have `Launch.sampled` made when these are known, while the forward pass is computed.

        Raises:
            RuntimeError: the tokens of the last launch are not chosen.
        """
        if self._unchosen is not None and not self._unchosen.chosen:
            raise RuntimeError("a step cannot be launched before the tokens of the last one are chosen")
        batch = self._rows.arrange(sequences)
        if self._sizes is None:
            logits = self._exact_step(batch)
        else:
            size, logits = next_size(self._sizes, len(batch)), self._logits[: len(batch)]
            if self._graphs is not None:
                self._graphs.replay(size)
            else:
                self._padded_step(size)
        launch = Launch(batch, logits, partial(self._choose, batch, self._lens(batch), logits))
        needed = () if self._sampling is None else self._sampling.needs_last_tokens(batch)
        if all(sequence.last_token is not None for sequence in needed):
            _ = launch.sampled
        self._unchosen = None if launch.chosen else launch
        return launch

    @staticmethod
    def _lens(batch: Sequence[S]) -> tuple[int, ...]:
        return tuple(sequence.num_scheduled for sequence in batch)

    def _choose(self, batch: Sequence[S], lens: Sequence[int], logits: torch.Tensor) -> SampledBatch:
        count = len(batch)
        tokens, seq_lens = self._rows.tokens[:count], self._rows.seq_lens[:count]
        if self._sampling is None:
            return SampledBatch(tokens)
        return self._sampling.sample(batch, lens, logits, seq_lens, tokens)

    @torch.inference_mode()
    def _padded_step(self, num_rows: int) -> None:
        """A step that can be captured: beside its size, it depends on what the rows hold on the device alone."""
        lens = (self._max_model_len,) * num_rows
        self._step(lens, [tables[:num_rows] for tables in self._rows.block_tables], self._logits[:num_rows])

    def _exact_step(self, batch: Sequence[S]) -> torch.Tensor:
        lens = self._lens(batch)
        tables = [
            group_tables[: len(batch), : max(len(sequence.tables.groups[i].blocks) for sequence in batch)]
            for i, group_tables in enumerate(self._rows.block_tables)
        ]
        return self._step(lens, tables, None)

    def _step(
        self, lens: tuple[int, ...], block_tables: Sequence[torch.Tensor], out: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute the first `len(lens)` rows, which are at most `lens` tokens long; returns their logits."""
        num_rows = len(lens)
        inputs = self._rows.inputs(num_rows)
        metadata = [
            CommonAttentionMetadata(
                cu_seqlens_q=self._cu_seqlens_q[: num_rows + 1],
                seq_lens=inputs.seq_lens,
                block_tables=tables,
                slot_mapping=slots,
                query_lens=(1,) * num_rows,
                context_lens=lens,
            )
            for tables, slots in zip(block_tables, self._rows.slot_mappings(inputs), strict=True)
        ]
        hidden = self._model(inputs.token_ids, inputs.positions, self._kv_caches, metadata)
        logits: torch.Tensor = self._model.project(hidden, out)
        greedy_sample(logits, self._rows.tokens[:num_rows])
        return logits

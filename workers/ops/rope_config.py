"""What kinds of rotary position embedding there are, and the numbers that each needs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (Chen et al., 2023, arXiv:2306.15595): every frequency is divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class DynamicScaling:
    """NTK-aware scaling: the base grows with the context beyond `max_position_embeddings`, and not below it.

    `transformers` computes the base anew whenever a sequence grows; keys in a cache were rotated with the one before.
    Here it is fixed when a model is made, as for a sequence of the longest length that is served (`max_model_len`), so
    a cached key means the same for ever, to every worker that serves that length. Up to `max_position_embeddings` that
    is `transformers`' unscaled base.
    """

    factor: float
    max_position_embeddings: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al., 2023, arXiv:2309.00071): high frequencies are kept, low ones interpolated, blended between.

    Attributes:
        factor: by which the context grew.
        original_max_position_embeddings: the context it grew from, tokens.
        beta_fast: a dimension that turns more often than this within the original context is kept.
        beta_slow: one that turns less often is interpolated.
        truncate: whether the bounds between them are rounded to whole dimensions.
        attention_factor: multiplies cosines and sines; None: see `workers.ops.rope_frequencies.attention_factor`.
        mscale: DeepSeek's weight of the logarithm in that factor; 0: absent.
        mscale_all_dim: the same in the factor that goes to the softmax scale, and is divided out of this one.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (Ding et al., 2024, arXiv:2402.13753): a factor for each frequency, from one of two sets.

    `transformers` takes the set by the length of each batch, so that a sequence that grows past
    `original_max_position_embeddings` attends to keys rotated otherwise. Here, as in vLLM, it is taken when a model is
    made: the long set where sequences longer than that are served (`max_model_len`), and then for all of them, on every
    worker. The short set is had by a `max_model_len` of the original context.

    Attributes:
        short_factor: one number for each pair of rotated dimensions.
        long_factor: the same.
        factor: by which the context grew.
        original_max_position_embeddings: the context it grew from, tokens.
        attention_factor: multiplies cosines and sines; None: computed from `factor`.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None


@dataclass(frozen=True)
class Llama3Scaling:
    """The rope scaling of Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, the rest blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ProportionalScaling:
    """Of the pairs (i, i + D / 2) of a whole head the first `partial_rotary_factor` turn, the others stand still.

    Unlike a partial rotation, which pairs dimensions within the first part of the head. Frequencies are divided by
    `factor`.
    """

    factor: float = 1.0


RopeScaling = LinearScaling | DynamicScaling | YarnScaling | LongRopeScaling | Llama3Scaling | ProportionalScaling


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of a layer.

    Attributes:
        theta: the base of the frequencies.
        scaling: how they are scaled; None: not.
        partial_rotary_factor: what part of a head is rotated, its first dimensions.
        interleaved: whether dimensions (2i, 2i + 1) turn together, and not (i, i + half of what is rotated).
    """

    theta: float
    scaling: RopeScaling | None = None
    partial_rotary_factor: float = 1.0
    interleaved: bool = False

    def rotary_dim(self, head_size: int) -> int:
        """How many of a head's dimensions are rotated; the rest pass as they are."""
        if isinstance(self.scaling, ProportionalScaling):
            return head_size
        return int(head_size * self.partial_rotary_factor)

    def context_window(self, max_position_embeddings: int) -> int:
        """How many tokens are served when nothing is asked for: what YaRN says it was extended to, or the model's own.

        A config that YaRN was added to by hand keeps the `max_position_embeddings` from before.
        """
        if isinstance(self.scaling, YarnScaling):
            extended = int(self.scaling.original_max_position_embeddings * self.scaling.factor)
            return max(max_position_embeddings, extended)
        return max_position_embeddings

    def longest_context(self, max_position_embeddings: int) -> int:
        """How many tokens may be asked for: linear and dynamic scaling reach `factor` times as far, as in vLLM."""
        if isinstance(self.scaling, LinearScaling | DynamicScaling):
            return max(max_position_embeddings, int(max_position_embeddings * self.scaling.factor))
        return self.context_window(max_position_embeddings)

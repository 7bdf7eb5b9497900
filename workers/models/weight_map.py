"""Where each tensor of a checkpoint goes: the renames, the fusions and the shards of a family, as a table.

Of `size` ranks each holds some output features of a layer's first projections (rows of their weights) and the same
input features of its second ones (columns), after Megatron-LM (Shoeybi et al., 2019, arXiv:1909.08053).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass

import torch

from workers.layers.lm_head import vocab_share
from workers.loading.expert_weights import in_fp8_blocks, kept_in_mxfp4
from workers.loading.quantized_storage import Fp8BlockStorage, Mxfp4Storage
from workers.loading.stored_tensor import whole
from workers.loading.weight_target import WeightTarget, of_layer
from workers.models.config.attention_config import AttentionConfig
from workers.models.config.model_config import ModelConfig


@dataclass(frozen=True)
class Share:
    """A dimension of a checkpoint's tensor, and the part of it that a rank holds."""

    size: int
    begin: int
    end: int

    @classmethod
    def all(cls, size: int) -> Share:
        """Every rank holds all of it."""
        return cls(size, 0, size)

    @property
    def length(self) -> int:
        """Of the part."""
        return self.end - self.begin

    @property
    def range(self) -> tuple[int, int]:
        """Begin and end."""
        return self.begin, self.end

    def within(self, first: int, size: int) -> Share:
        """The same part where the dimension begins at `first` of a larger one of `size`."""
        return Share(size, first + self.begin, first + self.end)


class WeightMap:
    """The tensors that a checkpoint of a model must hold, for one of `size` ranks.

    Attributes:
        targets: by the tensor's name there; one tensor may fill several places.
        unused: names of tensors that a checkpoint may hold although nothing reads them.
        renamed: how names begin in some checkpoints, and how in `targets` and `unused`: of a text model inside another.
        ignored: how names begin that nothing reads: of the other parts of such a model.
        tied: of `unused`, what would be the output matrix if it were not the embedding.

    Args:
        rank: 0 to `size` - 1.
        size: ranks that share the model.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.targets: dict[str, list[WeightTarget]] = {}
        self.unused: set[str] = set()
        self.renamed: dict[str, str] = {}
        self.ignored: set[str] = set()
        self.tied: set[str] = set()
        self._forms: list[tuple[WeightMap, ...]] = []
        self.rank = rank
        self.size = size

    @property
    def num_elements(self) -> int:
        """Elements that this rank holds of all of them together."""
        targets = (target for targets in self.targets.values() for target in targets)
        return sum(math.prod(end - begin for begin, end in target.region) for target in targets)

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that this rank holds of all of them, in `dtype` where they are not kept as they are stored."""
        targets = (target for targets in self.targets.values() for target in targets)
        return sum(
            math.prod(end - begin for begin, end in target.region) * (1 if target.raw else dtype.itemsize)
            for target in targets
        )

    @property
    def in_mxfp4(self) -> dict[str, list[WeightTarget]]:
        """Tensors that checkpoints hold in MXFP4, and that are dequantised."""
        quantized = {
            name: [t for t in targets if t.quantized is not None and isinstance(t.quantized.storage, Mxfp4Storage)]
            for name, targets in self.targets.items()
        }
        return {name: targets for name, targets in quantized.items() if targets}

    @property
    def scales(self) -> list[str]:
        """Names of the tensors that quantised ones are scaled with."""
        targets = (target for targets in self.targets.values() for target in targets)
        return [q.scales for target in targets if (q := target.quantized) is not None and q.scales is not None]

    def is_unused(self, name: str) -> bool:
        """Whether a checkpoint may hold this tensor although nothing reads it."""
        return name in self.unused or name.startswith(tuple(self.ignored)) or name.endswith("rotary_emb.inv_freq")

    def canonical(self, name: str) -> str:
        """The name in `targets` of what a checkpoint calls so."""
        for theirs, ours in self.renamed.items():
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        return name

    def like(self) -> WeightMap:
        """An empty one of the same rank."""
        return WeightMap(self.rank, self.size)

    def include(self, other: WeightMap) -> None:
        """Enter all that another has."""
        for name, targets in other.targets.items():
            self.targets.setdefault(name, []).extend(targets)
        self.unused |= other.unused
        self.renamed |= other.renamed
        self.ignored |= other.ignored
        self.tied |= other.tied
        self._forms += other._forms

    def one_of(self, *forms: WeightMap) -> None:
        """Enter tensors that checkpoints hold in one of several forms, the usual one first; see `resolved`."""
        self.include(forms[0])
        self._forms.append(forms)

    def resolved(self, names: Container[str]) -> WeightMap:
        """The map for a checkpoint with these tensors: of several forms the first that has one there of its own.

        Where none has, it is the usual one.
        """
        found = self.like()
        found.include(self)
        for forms in found._forms:
            usual, chosen = forms[0], next((form for form in forms if form._is_seen(forms, names)), forms[0])
            if chosen is not usual:
                found.targets = {name: there for name, there in found.targets.items() if name not in usual.targets}
                found.include(chosen)
        found._forms = []
        return found

    def adapted(self, adapt: Callable[[str, WeightTarget], WeightTarget]) -> WeightMap:
        """The map for a checkpoint that holds the same tensors in another form: `adapt` gives each name's target."""
        found = self.like()
        found.include(self)
        found.targets = {name: [adapt(name, each) for each in targets] for name, targets in self.targets.items()}
        return found

    def keeping_mxfp4(self) -> WeightMap:
        """The map for a model that keeps in MXFP4 what a checkpoint holds so.

        Raises:
            ConfigError: the rank's share of something is not made of whole blocks.
        """
        found = self.like()
        found.include(self)
        for name, targets in self.in_mxfp4.items():
            for kept in (kept_in_mxfp4(name, target) for target in targets):
                found.targets |= {each: [place] for each, place in kept.items()}
        return found

    def in_fp8_blocks(self, storage: Fp8BlockStorage, names: Container[str]) -> WeightMap:
        """The map for a checkpoint with these tensors: matrices are in FP8 that it holds a `weight_scale_inv` of."""
        found = self.like()
        found.include(self)
        for name, targets in found.targets.items():
            if f"{name}_scale_inv" in names:
                found.targets[name] = [in_fp8_blocks({name: target}, storage)[name] for target in targets]
        return found

    def _is_seen(self, forms: Iterable[WeightMap], names: Container[str]) -> bool:
        """Whether any of these names is in this one of the forms alone."""
        elsewhere = {name for form in forms if form is not self for name in form.targets}
        return any(name in names for name in self.targets if name not in elsewhere)

    def share(self, size: int) -> Share:
        """An equal part of a dimension for each rank."""
        part = size // self.size
        return Share(size, self.rank * part, (self.rank + 1) * part)

    def heads(self, num_heads: int, head_size: int) -> Share:
        """Each rank's part of a dimension of heads; neighbouring ranks have the same one, where heads are fewer."""
        own = max(1, num_heads // self.size)
        first = self.rank * num_heads // self.size // own * own
        return Share(num_heads * head_size, first * head_size, (first + own) * head_size)

    def vector(
        self,
        name: str,
        parameter: str,
        share: Share | int,
        *,
        rows: tuple[int, int] | None = None,
        index: tuple[int, ...] = (),
    ) -> None:
        """A tensor of one dimension.

        Args:
            name: in the checkpoint.
            parameter: that it fills.
            share: of it; a size: all of it.
            rows: of the parameter that are filled; a parameter of two dimensions gets it in each of these rows. None:
                as many as there are elements.
            index: leading indices of the parameter.
        """
        share = Share.all(share) if isinstance(share, int) else share
        begin, end = (0, share.length) if rows is None else rows
        self._add(name, WeightTarget(parameter, (share.size,), (share.range,), begin, end, index))

    def matrix(
        self,
        name: str,
        parameter: str,
        rows: Share,
        columns: Share | int,
        *,
        begin: int = 0,
        bias: bool = False,
        index: tuple[int, ...] = (),
    ) -> None:
        """A projection: `{name}.weight`, (out, in), and its bias where there is one.

        Args:
            name: in the checkpoint, without `.weight`.
            parameter: that it fills, without `.weight`.
            rows: its output features.
            columns: its input features; a size: all of them.
            begin: first row of the parameter that it fills.
            bias: whether there is one.
            index: leading indices of the parameter.
        """
        columns = Share.all(columns) if isinstance(columns, int) else columns
        shape, region, end = (rows.size, columns.size), (rows.range, columns.range), begin + rows.length
        self._add(f"{name}.weight", WeightTarget(f"{parameter}.weight", shape, region, begin, end, index))
        if bias:
            self.vector(f"{name}.bias", f"{parameter}.bias", rows, rows=(begin, end), index=index)

    def text_of_multi_modal(self, others: Iterable[str]) -> None:
        """Call the tensors of a text model as a multi-modal checkpoint does, in either of transformers' spellings.

        Args:
            others: names of the parts beside it, which nothing reads.
        """
        self.renamed |= {"language_model.model.": "model.", "model.language_model.": "model."}
        self.renamed |= {"language_model.lm_head.": "lm_head."}
        self.ignored |= {f"{prefix}{other}." for other in others for prefix in ("", "model.")}

    def outside_layers(self, config: ModelConfig) -> None:
        """Embedding, last norm and output matrix, as most families call them."""
        vocab, hidden = config.vocab_size, config.hidden_size
        self.embedding("model.embed_tokens.weight", vocab, hidden)
        self.vector("model.norm.weight", "norm.weight", hidden)
        self.lm_head("lm_head.weight", vocab, hidden, tied=config.tie_word_embeddings)

    def embedding(self, name: str, vocab_size: int, hidden_size: int) -> None:
        """The embedding, whole on every rank: looking it up then takes no communication, for little memory."""
        shape = (vocab_size, hidden_size)
        self._add(name, WeightTarget("embed_tokens", shape, whole(shape), 0, vocab_size))

    def lm_head(self, name: str, vocab_size: int, hidden_size: int, *, tied: bool) -> None:
        """The output matrix, of which each rank holds its share; a tied one is a view of the embedding."""
        if tied:
            self.unused.add(name)
            self.tied.add(name)
            return
        share = vocab_share(vocab_size, self.size)
        begin, end = min(self.rank * share, vocab_size), min((self.rank + 1) * share, vocab_size)
        region = ((begin, end), (0, hidden_size))
        self._add(name, WeightTarget("lm_head.weight", (vocab_size, hidden_size), region, 0, end - begin))

    def attention(
        self,
        theirs: str,
        ours: str,
        config: AttentionConfig,
        hidden_size: int,
        *,
        qkv_bias: bool = False,
        o_bias: bool = False,
        fused: bool = False,
    ) -> None:
        """`q_proj`, `k_proj` and `v_proj`, or a fused tensor, into `qkv_proj`, and `o_proj`; of the whole model."""
        q = self.heads(config.num_heads, config.head_size)
        kv = self.heads(config.num_kv_heads, config.head_size)
        parts = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        self._stacked(theirs, parts, f"{ours}.qkv_proj", hidden_size, bias=qkv_bias, fused="qkv_proj" if fused else "")
        self.matrix(f"{theirs}.o_proj", f"{ours}.o_proj", Share.all(hidden_size), q, bias=o_bias)

    def head_norms(self, theirs: str, ours: str, config: AttentionConfig) -> None:
        """`q_norm` and `k_norm`, one weight for all heads of a kind, into `qk_norm`, one row a head of this rank."""
        own, size = config.sharded(self.size), config.head_size
        num_heads, num_all = own.num_heads, own.num_heads + own.num_kv_heads
        for name, rows in (("q_norm", (0, num_heads)), ("k_norm", (num_heads, num_all))):
            self.vector(f"{theirs}.{name}.weight", f"{ours}.qk_norm.weight", size, rows=rows)

    def wide_norms(self, theirs: str, ours: str, config: AttentionConfig) -> None:
        """`q_norm` and `k_norm`, a weight for each feature of all heads of a kind, into one `wide_norm`."""
        begin = 0
        for name, num_heads in (("q_norm", config.num_heads), ("k_norm", config.num_kv_heads)):
            share = self.heads(num_heads, config.head_size)
            rows = (begin, begin + share.length)
            self.vector(f"{theirs}.{name}.weight", f"{ours}.wide_norm.weight", share, rows=rows)
            begin = rows[1]

    def gated_mlp(
        self,
        theirs: str,
        ours: str,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool = False,
        fused: bool = False,
    ) -> None:
        """`gate_proj` and `up_proj`, or a fused tensor, into `gate_up_proj`, and `down_proj`."""
        inner = self.share(intermediate_size)
        parts, name = {"gate_proj": inner, "up_proj": inner}, "gate_up_proj"
        self._stacked(theirs, parts, f"{ours}.{name}", hidden_size, bias=bias, fused=name if fused else "")
        self.matrix(f"{theirs}.down_proj", f"{ours}.down_proj", Share.all(hidden_size), inner, bias=bias)

    def extend(self, targets: Mapping[str, WeightTarget], theirs: str, ours: str) -> None:
        """Targets whose names are within a layer: `theirs` in the checkpoint, `ours` in the model."""
        for name, target in targets.items():
            self._add(f"{theirs}.{name}", of_layer(target, f"{theirs}.", f"{ours}."))

    def _stacked(
        self, theirs: str, parts: Mapping[str, Share], ours: str, hidden_size: int, *, bias: bool, fused: str
    ) -> None:
        """Projections into one parameter, from a tensor each, or all from a `fused` one that has them in this order."""
        begin, first, size = 0, 0, sum(share.size for share in parts.values())
        for name, share in parts.items():
            rows = share.within(first, size) if fused else share
            self.matrix(f"{theirs}.{fused or name}", ours, rows, hidden_size, begin=begin, bias=bias)
            begin, first = begin + share.length, first + share.size

    def _add(self, name: str, target: WeightTarget) -> None:
        self.targets.setdefault(name, []).append(target)

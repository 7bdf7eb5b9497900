"""Random inputs of a conformance case: tensors, a poisoned paged cache, the batch, and what should come out."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

import numpy as np
import torch

from attention.backend import KVScales
from attention.fp8 import quantize
from attention.kv_cache import KVCacheSpec
from attention.metadata import CommonAttentionMetadata, build_encoder_metadata, build_metadata
from attention.spec import FP8, AttentionSpec, AttentionType
from attention_cases import Case
from attention_reference import attend, fp8_round_trip, visible_keys

LAYER = 1
"""The layer of `Inputs.cache` that attends; the others must stay as they are."""
_LAYERS = 2
_SPARE_BLOCKS = 3
_FP8_NAN = 0x7F


@dataclass(frozen=True)
class Inputs:
    """All that a backend is given for one case.

    Attributes:
        spec: the layer.
        common: the batch.
        query: (T, Hq, D), like `key` and `value` a strided cut of one projection.
        key: (Tk, Hkv, D); None where the case has nothing new.
        value: (Tk, Hkv, D), or None with `key`.
        cache: (layers, num_blocks, 2, block_size, Hkv, D), NaN wherever no token is; None where nothing is cached.
        sinks: (Hq,) float32, where the layer has them.
        scales: of an FP8 cache.
        expected: (T, Hq, D) float64.
    """

    spec: AttentionSpec
    common: CommonAttentionMetadata
    query: torch.Tensor
    key: torch.Tensor | None
    value: torch.Tensor | None
    cache: torch.Tensor | None
    sinks: torch.Tensor | None
    scales: KVScales
    expected: torch.Tensor

    def cache_after(self) -> torch.Tensor | None:
        """A copy of the cache with the batch's keys and values in their slots; take it before the backend runs."""
        if self.cache is None:
            return None
        after = self.cache.clone()
        if self.key is not None and self.value is not None:
            put(after[LAYER], self.common.slot_mapping, self.key, self.value, self.scales)
        return after


def draw(case: Case, device: torch.device | str) -> Inputs:
    """The inputs of a case, the same at every call."""
    seed = zlib.crc32(case.id.encode())
    generator = torch.Generator(device).manual_seed(seed)
    spec, heads, size = case.spec, case.num_heads, case.head_size

    def normal(tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(tokens, heads, size, generator=generator, device=device).to(case.dtype)

    tables, num_blocks = _block_tables(case, random.Random(seed))
    keys, values = (_shared_prefix(case, normal(sum(case.key_lens), case.num_kv_heads)) for _ in range(2))
    new = _new_tokens(case).to(device)
    slots = _slots(case, tables).to(device)
    masks = {"tree_mask": _tree_mask(case, seed, device), "custom_mask": _custom_mask(case, seed, device)}
    common = _metadata(case, tables, slots[new], device, masks)
    cache = None
    if spec.attn_type.cached:
        cache_spec = KVCacheSpec(
            tuple(range(_LAYERS)), case.num_kv_heads, size, case.block_size, spec.kv_cache_dtype or case.dtype
        )
        cache = poison(cache_spec.allocate(num_blocks, device))
        stored = ~new if case.new_keys != "none" else torch.ones_like(new)
        put(cache[LAYER], slots[stored], keys[stored], values[stored], case.scales)
    query, key, value = _projection(case, normal(sum(case.query_lens), heads), keys[new], values[new])
    sinks = torch.randn(heads, generator=generator, device=device) * 2 if spec.has_sinks else None
    if spec.kv_cache_dtype == FP8:
        keys, values = fp8_round_trip(keys, case.scales.k), fp8_round_trip(values, case.scales.v)
    expected = _expected(case, query, keys, values, masks, sinks)
    return Inputs(spec, common, query, key, value, cache, sinks, case.scales, expected)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill a tensor with NaN and return it."""
    if tensor.dtype == FP8:
        tensor.view(torch.uint8).fill_(_FP8_NAN)
    else:
        tensor.fill_(float("nan"))
    return tensor


def put(layer: torch.Tensor, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scales: KVScales) -> None:
    """Write keys and values into slots of one layer's cache, by plain indexing."""
    blocks, offsets = slots // layer.shape[2], slots % layer.shape[2]
    if layer.dtype == FP8:  # indexing knows no FP8
        key, value = (quantize(t, s).view(torch.uint8) for t, s in ((key, scales.k), (value, scales.v)))
        layer = layer.view(torch.uint8)
    layer[blocks, 0, offsets] = key
    layer[blocks, 1, offsets] = value


def _block_tables(case: Case, rng: random.Random) -> tuple[list[list[int]], int]:
    """Shuffled blocks for every sequence, those of a common prefix shared, and how many blocks there are."""
    shared = case.common_prefix // case.block_size
    needed = [-(-length // case.block_size) for length in case.key_lens]
    num_blocks = shared + sum(n - shared for n in needed) + _SPARE_BLOCKS
    free = list(range(num_blocks))
    rng.shuffle(free)
    prefix = [free.pop() for _ in range(shared)]
    return [[*prefix, *(free.pop() for _ in range(n - shared))] for n in needed], num_blocks


def _shared_prefix(case: Case, packed: torch.Tensor) -> torch.Tensor:
    """Give every sequence the first sequence's tokens in the common prefix."""
    for sequence in packed.split(list(case.key_lens)):
        sequence[: case.common_prefix] = packed[: case.common_prefix]
    return packed


def _new_tokens(case: Case) -> torch.Tensor:
    """(keys of all sequences,) bool: which the batch brings; of a decoder with "none", which it brought before."""
    new = []
    for i, (query_len, key_len) in enumerate(case.lens):
        if case.attn_type is AttentionType.ENCODER_DECODER:
            brought = {"all": True, "some": i % 2 == 0, "none": False}[case.new_keys]
            new.append(torch.full((key_len,), brought))
        else:
            new.append(torch.arange(key_len) >= key_len - query_len)
    return torch.cat(new)


def _slots(case: Case, tables: list[list[int]]) -> torch.Tensor:
    """(keys of all sequences,) int64: where each is in the cache."""
    slots = []
    for key_len, table in zip(case.key_lens, tables, strict=True):
        positions = np.arange(key_len)
        slots.append(np.asarray(table)[positions // case.block_size] * case.block_size + positions % case.block_size)
    return torch.from_numpy(np.concatenate(slots).astype(np.int64))


def _tree_mask(case: Case, seed: int, device: torch.device | str) -> torch.Tensor | None:
    """A random draft tree: every node sees its ancestors and itself."""
    if case.mask != "tree":
        return None
    nodes, rng = case.query_lens[0], random.Random(seed)
    mask = torch.eye(nodes, dtype=torch.bool)
    for node in range(1, nodes):
        mask[node] |= mask[rng.randrange(node)]
    return mask.to(device)


def _custom_mask(case: Case, seed: int, device: torch.device | str) -> torch.Tensor | None:
    """Random masks that look ahead, too; of each sequence's rows the first sees one key, the third none, some few."""
    if case.mask != "custom":
        return None
    generator = torch.Generator().manual_seed(seed)
    masks = []
    for query_len, key_len in case.lens:
        mask = torch.rand(query_len, key_len, generator=generator) < 0.6
        mask[::4] &= torch.rand(mask[::4].shape, generator=generator) < 0.1
        mask[0] = False
        mask[0, -1] = True
        mask[2:3] = False
        masks.append(mask.flatten())
    return torch.cat(masks).to(device)


def _metadata(
    case: Case,
    tables: list[list[int]],
    new_slots: torch.Tensor,
    device: torch.device | str,
    masks: dict[str, torch.Tensor | None],
) -> CommonAttentionMetadata:
    if not case.attn_type.cached:
        return build_encoder_metadata(case.query_lens, device)
    if case.attn_type is AttentionType.DECODER:
        return build_metadata(
            case.query_lens,
            case.key_lens,
            tables,
            case.block_size,
            device,
            common_prefix_len=case.common_prefix,
            **masks,
        )
    padded = torch.zeros(len(tables), max(map(len, tables)), dtype=torch.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = torch.tensor(table, dtype=torch.int32)
    offsets = torch.tensor([0, *case.query_lens]).cumsum(0)
    return CommonAttentionMetadata(
        cu_seqlens_q=offsets.to(device, torch.int32),
        seq_lens=torch.tensor(case.key_lens, dtype=torch.int32, device=device),
        block_tables=padded.to(device),
        slot_mapping=new_slots,
        query_lens=case.query_lens,
        context_lens=case.key_lens,
    )


def _projection(
    case: Case, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The same as cuts of one fused projection; in cross attention of one for queries and one for keys."""
    hq, hkv = case.num_heads, case.num_kv_heads
    if case.attn_type is not AttentionType.ENCODER_DECODER:
        query, key, value = torch.cat((query, key, value), dim=1).split((hq, hkv, hkv), dim=1)
    else:
        query = torch.cat((query, torch.full_like(query[:, :1], float("nan"))), dim=1)[:, :hq]
        key, value = torch.cat((key, value), dim=1).split((hkv, hkv), dim=1)
    return (query, None, None) if case.new_keys == "none" else (query, key, value)


def _expected(
    case: Case,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    masks: dict[str, torch.Tensor | None],
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    custom = masks["custom_mask"]
    areas = [n * s for n, s in case.lens]
    customs = custom.split(areas) if custom is not None else [None] * len(areas)
    sequences = zip(
        case.lens,
        query.split(list(case.query_lens)),
        keys.split(list(case.key_lens)),
        values.split(list(case.key_lens)),
        customs,
        strict=True,
    )
    outputs = []
    for (n, s), q, k, v, rows in sequences:
        seen = (
            rows.view(n, s)
            if rows is not None
            else visible_keys(case.spec, n, s, query.device, tree_mask=masks["tree_mask"])
        )
        outputs.append(attend(q, k, v, case.spec, seen, sinks))
    return torch.cat(outputs)

"""TORCH_SDPA: PyTorch's own attention, one sequence at a time. Plain, and the yardstick for the others."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812

from attention.backend import AttentionBackend, AttentionImpl, AttentionMetadata, AttentionSpec
from attention.backends.sdpa_plan import DecodeGroup, PrefillSequence, SdpaPlan, make_plan
from attention.kv_cache import store_rows, token_rows

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TorchSdpaImpl(AttentionImpl):
    """One layer's attention through `scaled_dot_product_attention`.

    Query heads that share a key/value head are never given copies of it: in prefill they are a stride of zero, in
    decode they are the query rows.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        plan: object,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `AttentionImpl.forward`; `plan` is an `SdpaPlan`."""
        plan = cast(SdpaPlan, plan)
        store_rows(key, value, kv_cache, plan.store)
        if output is None:
            if len(plan.decode) == 1 and plan.decode[0].tokens is None:
                return self._decode(query, kv_cache, plan.decode[0])
            output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for sequence in plan.prefill:
            self._prefill(query, key, value, kv_cache, sequence, output)
        for group in plan.decode:
            if group.tokens is None:
                output.copy_(self._decode(query, kv_cache, group))
            else:
                output[group.tokens] = self._decode(query[group.tokens], kv_cache, group)
        return output

    def _prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        sequence: PrefillSequence,
        output: torch.Tensor,
    ) -> None:
        heads, size = self.spec.num_kv_heads, self.spec.head_size
        group = self.spec.num_heads // heads
        if sequence.rows is None:
            keys, values = key[sequence.q_begin : sequence.q_end], value[sequence.q_begin : sequence.q_end]
        else:
            keys, values = token_rows(kv_cache).index_select(0, sequence.rows).view(2, -1, heads, size).unbind(0)
        for tile in sequence.tiles:
            q = query[tile.q_begin : tile.q_end].unflatten(1, (heads, group)).permute(1, 2, 0, 3)
            k = keys[tile.k_begin : tile.k_end].transpose(0, 1)[:, None].expand(-1, group, -1, -1)
            v = values[tile.k_begin : tile.k_end].transpose(0, 1)[:, None].expand(-1, group, -1, -1)
            attended = F.scaled_dot_product_attention(
                q, k, v, attn_mask=tile.mask, is_causal=tile.mask is None, scale=self.spec.scale
            )
            output[tile.q_begin : tile.q_end].unflatten(1, (heads, group)).copy_(attended.permute(2, 0, 1, 3))

    def _decode(self, query: torch.Tensor, kv_cache: torch.Tensor, group: DecodeGroup) -> torch.Tensor:
        heads, size = self.spec.num_kv_heads, self.spec.head_size
        gathered = token_rows(kv_cache).index_select(0, group.rows).view(2, group.size, -1, heads, size)
        keys, values = gathered.transpose(2, 3).unbind(0)
        q = query.reshape(group.size, heads, -1, size)
        if q.shape[2] == 1 and q.dtype == torch.bfloat16:  # a single row takes a path that is several times slower
            q = q.expand(-1, -1, 2, -1)
        attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=group.mask, scale=self.spec.scale)
        attended = attended[:, :, : self.spec.num_heads // heads]
        return attended.reshape(group.size, self.spec.num_heads, size)


class TorchSdpaBackend(AttentionBackend):
    """Runs on any CPU, in any floating dtype that PyTorch's attention knows."""

    name = "TORCH_SDPA"
    impl_class: type[AttentionImpl] = TorchSdpaImpl

    @classmethod
    def refuse(cls, device: torch.device, dtype: torch.dtype, spec: AttentionSpec, block_size: int) -> list[str]:
        """See `AttentionBackend.refuse`."""
        reasons = []
        if device.type != "cpu":
            reasons.append(f"runs on cpu, not on {device.type}")
        if dtype not in _DTYPES:
            reasons.append(f"dtype {dtype} is not one of {', '.join(str(d) for d in _DTYPES)}")
        if spec.num_kv_heads < 1 or spec.num_heads % spec.num_kv_heads:
            reasons.append(f"{spec.num_heads} query heads do not divide among {spec.num_kv_heads} key/value heads")
        if spec.sliding_window is not None and spec.sliding_window < 1:
            reasons.append(f"a sliding window holds at least 1 token, not {spec.sliding_window}")
        if block_size < 1:
            reasons.append(f"a block holds at least 1 token, not {block_size}")
        return reasons

    @classmethod
    def plan(cls, spec: AttentionSpec, metadata: AttentionMetadata, block_size: int) -> SdpaPlan:
        """See `AttentionBackend.plan`: every decoding sequence on its own."""
        return make_plan(spec, metadata, block_size, max_group_tokens=0)

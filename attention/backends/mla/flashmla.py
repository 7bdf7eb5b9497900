"""FLASHMLA: DeepSeek's decode kernel for Hopper (https://github.com/deepseek-ai/FlashMLA).

Its dense decode kernel, `flash_mla_with_kvcache`, is made for SM 9.0 and a bf16 or fp16 cache in blocks of 64; what the
library has for SM 10.x and FP8 is sparse attention. It reads lengths on the device, and so does `get_mla_metadata`,
whose result serves all layers of a batch.
"""

from __future__ import annotations

from typing import Any

import torch

from attention.backends.common.libraries import load_library
from attention.backends.mla.decoding import DecodingImpl
from attention.backends.mla.expanding import DecodeBatch, ExpandingBackend, ExpandingBuilder
from attention.capability import HALVES, Capabilities, DeviceSupport, Sizes
from attention.platform import DeviceKind
from attention.spec import Feature, Phase

NAME = "FLASHMLA"


class FlashMLABuilder(ExpandingBuilder):
    """Has the library deal a batch out to multiprocessors."""

    def plan_decode(self, batch: DecodeBatch) -> Any:
        """See `ExpandingBuilder.plan_decode`: the library's metadata and numbers of splits."""
        return load_library("flash_mla", NAME).get_mla_metadata(batch.seq_lens, self.spec.num_heads, 1)


class FlashMLAImpl(DecodingImpl):
    """One layer's decode steps."""

    backend = NAME

    def attend_latents(
        self,
        query: torch.Tensor,
        rotary_query: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: DecodeBatch,
        call: Any,
        output: torch.Tensor,
    ) -> None:
        """See `ExpandingImpl.attend_latents`."""
        metadata, num_splits = call
        attended, _ = load_library("flash_mla", NAME).flash_mla_with_kvcache(
            self.joined(query).unsqueeze(1),
            kv_cache.unsqueeze(2),
            batch.block_tables,
            batch.seq_lens,
            self.mla.kv_lora_rank,
            metadata,
            num_splits,
            softmax_scale=self.spec.scale,
            causal=False,
        )
        output.copy_(attended.squeeze(1))


class FlashMLABackend(ExpandingBackend):
    """DeepSeek's FlashMLA on Hopper, decode only."""

    name = NAME
    impl_class = FlashMLAImpl
    builder_class = FlashMLABuilder
    capabilities = Capabilities(
        devices=(DeviceSupport(DeviceKind.CUDA, low=(9, 0), high=(10, 0), packages=("flash_mla",)),),
        dtypes=HALVES,
        head_sizes=Sizes(only=(576,)),
        block_sizes=Sizes(only=(64,)),
        features=frozenset({Feature.GQA, Feature.PREFIX}),
        refused={Feature.FP8_KV: "FlashMLA reads FP8 in its sparse kernels only"},
        phases=(Phase.DECODE,),
        mla=True,
    )

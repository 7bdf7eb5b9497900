"""What a model must read and compute, by its configuration: the limits that measurements stand beside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_MXFP4_BITS = 4.25
"""Of a weight, with its share of the scale."""


@dataclass(frozen=True)
class Work:
    """What a decoder with grouped-query attention must read and compute.

    Attributes:
        layer_parameters: of all layers' matrices that a token is multiplied by, its own experts among them.
        head_parameters: of the output projection; every token that is sampled is multiplied by each.
        attention_flops_per_pair: for each (query, key) of all layers and heads, both products.
        kv_bytes_per_token: of all layers.
        element_bytes: of a weight and of an element of the cache.
        expert_parameters: of one expert, in all layers.
        num_experts: in a layer; 0: there are none.
        top_k: experts of a token.
        window: how many tokens a query sees in some of the layers; None: all.
        windowed: the share of these layers.
        expert_bits: of an expert's weight where it is not as other elements; None: it is.
    """

    layer_parameters: int
    head_parameters: int
    attention_flops_per_pair: int
    kv_bytes_per_token: int
    element_bytes: int = 2
    expert_parameters: int = 0
    num_experts: int = 0
    top_k: int = 0
    window: int | None = None
    windowed: float = 0.0
    expert_bits: float | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], element_bytes: int = 2) -> Work:
        """By a config.json of Llama's kind with experts in all layers or in none, or of DeepSeek's."""
        if "kv_lora_rank" in config:
            return cls._of_latents(config, element_bytes)
        hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
        heads, kv_heads = int(config["num_attention_heads"]), int(config["num_key_value_heads"])
        size = int(config.get("head_dim") or hidden // heads)
        attention = hidden * (heads + 2 * kv_heads) * size + heads * size * hidden
        num_experts = int(config.get("num_experts") or config.get("num_local_experts") or 0)
        top_k = int(config["num_experts_per_tok"]) if num_experts else 0
        inner = config.get("moe_intermediate_size") if num_experts else None
        mlp = 3 * hidden * int(inner or config["intermediate_size"])
        kinds = list(config.get("layer_types") or ())
        return cls(
            layer_parameters=layers * (attention + hidden * num_experts + mlp * (top_k or 1)),
            head_parameters=int(config["vocab_size"]) * hidden,
            attention_flops_per_pair=layers * heads * 4 * size,
            kv_bytes_per_token=layers * 2 * kv_heads * size * element_bytes,
            element_bytes=element_bytes,
            expert_parameters=layers * mlp if num_experts else 0,
            num_experts=num_experts,
            top_k=top_k,
            window=config.get("sliding_window") if "sliding_attention" in kinds else None,
            windowed=kinds.count("sliding_attention") / layers,
            expert_bits=_MXFP4_BITS if _in_mxfp4(config) else None,
        )

    @classmethod
    def _of_latents(cls, config: Mapping[str, Any], element_bytes: int) -> Work:
        """Of DeepSeek's kind: decode reads latents, prefill computes on what is expanded from them."""
        hidden, layers, heads = (int(config[k]) for k in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
        nope, rotary, value, rank = (
            int(config[k]) for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
        )
        compressed = config.get("q_lora_rank")
        query = heads * (nope + rotary)
        queries = hidden * query if compressed is None else int(compressed) * (hidden + query)
        attention = queries + hidden * (rank + rotary) + rank * heads * (nope + value) + heads * value * hidden
        num_experts, top_k = int(config["n_routed_experts"]), int(config["num_experts_per_tok"])
        dense = int(config["first_k_dense_replace"])
        expert = 3 * hidden * int(config["moe_intermediate_size"])
        sparse = layers - dense
        of_all = int(config.get("n_shared_experts") or 0) * expert + hidden * num_experts
        return cls(
            layer_parameters=layers * attention
            + dense * 3 * hidden * int(config["intermediate_size"])
            + sparse * (of_all + top_k * expert),
            head_parameters=int(config["vocab_size"]) * hidden,
            attention_flops_per_pair=layers * heads * 2 * (nope + rotary + value),
            kv_bytes_per_token=layers * (rank + rotary) * element_bytes,
            element_bytes=element_bytes,
            expert_parameters=sparse * expert,
            num_experts=num_experts,
            top_k=top_k,
        )

    def experts_of(self, batch: int) -> float:
        """How many experts of a layer the tokens of a batch go to, where they choose evenly and not alike."""
        if not self.num_experts:
            return 0.0
        return self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** batch)

    def decode_bytes(self, batch: int, context: float) -> float:
        """Bytes that a decode step must read: every matrix once, of experts those that tokens go to, and the cache.

        Of the embedding it reads only rows.
        """
        for_all = self.layer_parameters + self.head_parameters - self.top_k * self.expert_parameters
        expert_bytes = self.element_bytes if self.expert_bits is None else self.expert_bits / 8
        weights = for_all * self.element_bytes + self.experts_of(batch) * self.expert_parameters * expert_bytes
        return weights + batch * self._seen(context) * self.kv_bytes_per_token

    def decode_flops(self, batch: int, context: float) -> float:
        """Operations of a decode step."""
        matrices = 2 * (self.layer_parameters + self.head_parameters)
        return batch * (matrices + self._seen(context) * self.attention_flops_per_pair)

    def prefill_flops(self, prompts: int, tokens: int) -> float:
        """Operations of `prompts` prompts of `tokens` tokens, causal, one sampled token each."""
        pairs = tokens * (tokens + 1) / 2
        if self.window is not None and tokens > self.window:
            beyond = (tokens - self.window) * (tokens - self.window + 1) / 2
            pairs -= self.windowed * beyond
        each = 2 * self.layer_parameters * tokens + 2 * self.head_parameters + pairs * self.attention_flops_per_pair
        return prompts * each

    def _seen(self, context: float) -> float:
        """Tokens that a query attends to, on average over the layers."""
        seen = context if self.window is None else min(context, self.window)
        return (1 - self.windowed) * context + self.windowed * seen


def _in_mxfp4(config: Mapping[str, Any]) -> bool:
    return dict(config.get("quantization_config") or {}).get("quant_method") == "mxfp4"

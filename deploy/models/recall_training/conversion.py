"""A model with latent attention and experts that begins as one with grouped-query attention, as near as it can be.

Attention (after TransMLA, arXiv:2502.07864).  What is rotated with one frequency is, of the keys of all
key/value heads, a vector of complex numbers, one a head.  Its principal direction becomes the one rotated
key that latent attention has for all heads: a key that says where a token is, which is what heads that look
at neighbours need, is captured whole.  What is left of the slow frequencies, which tell tokens apart by
content, goes into the latent beside the values, and is not rotated.  The norm of the latent has no
counterpart, which training makes up for.

Experts (after sparse upcycling, arXiv:2212.05055).  The neurons of an MLP that do most are the shared
expert's, and those after them every routed expert's: their weights have the sum 1, so that all of them
together are the MLP.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import DeepseekV3ForCausalLM, LlamaForCausalLM

from recall_training.batches import BatchMaker
from recall_training.samples import MAX_ENTRIES


@torch.no_grad()
def convert(source: LlamaForCausalLM, target: DeepseekV3ForCausalLM, maker: BatchMaker) -> None:
    """Write the weights of ``source`` into ``target``, of equal hidden size, heads and layers.

    What is said of typical sizes is measured on lists that ``maker`` makes.
    """
    inputs = _inputs_of_layers(source, maker)
    target.model.embed_tokens.weight.copy_(source.model.embed_tokens.weight)
    target.model.norm.weight.copy_(source.model.norm.weight)
    for index, (old, new) in enumerate(zip(source.model.layers, target.model.layers, strict=True)):
        new.input_layernorm.weight.copy_(old.input_layernorm.weight)
        new.post_attention_layernorm.weight.copy_(old.post_attention_layernorm.weight)
        attended, gated = inputs[index]
        _convert_attention(old.self_attn, new.self_attn, attended)
        _convert_mlp(old.mlp, new.mlp, gated)


def _inputs_of_layers(model: LlamaForCausalLM, maker: BatchMaker) -> list[tuple[Tensor, Tensor]]:
    """For each layer what its attention and its MLP are given, (tokens, hidden size) each."""
    seen: list[list[Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        norm.register_forward_hook(lambda _module, _inputs, output, into=into: into.append(output.flatten(0, 1)))
        for layer, into in zip(model.model.layers, seen, strict=True)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm)
    ]
    batch = maker.separate(4, MAX_ENTRIES, 16)
    model.model(input_ids=batch.ids, position_ids=batch.positions, attention_mask=batch.mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [(attended, gated) for attended, gated in seen]


def _convert_attention(old: nn.Module, new: nn.Module, inputs: Tensor) -> None:
    """One layer's attention; queries are not compressed."""
    heads, size, rank = new.num_heads, new.qk_rope_head_dim, new.kv_lora_rank
    groups, pairs, nope = heads // old.num_key_value_groups, size // 2, new.qk_nope_head_dim
    slow = pairs - nope // 2
    queries = _complex_rows(old.q_proj.weight, heads, pairs)
    keys = _complex_rows(old.k_proj.weight, groups, pairs)
    own_group = torch.arange(heads, device=inputs.device) // old.num_key_value_groups
    found = torch.complex(inputs, torch.zeros_like(inputs))
    strength = torch.einsum("hpc,tc->thp", queries, found).abs().square().mean(0)
    weights = strength.view(groups, -1, pairs).mean(1).sqrt().T.clamp(min=1e-6)  # (pairs, groups)
    weighted = torch.einsum("gpc,pg->pgc", keys, weights.to(keys.dtype))
    told = torch.einsum("pgc,tc->ptg", weighted, found)
    _, directions = torch.linalg.eigh(torch.einsum("ptg,pth->pgh", told, told.conj()) / len(inputs))
    main, others = directions[:, :, -1], directions[:, :, :-1]
    rotated = torch.einsum("pg,pgc->pc", main.conj(), weighted)
    left = torch.einsum("pgk,pgc->pkc", others[slow:].conj(), weighted[slow:])
    scale = math.sqrt((nope + size) / size)
    query = scale * queries * (main / weights).conj().T[own_group][:, :, None]
    plain = scale * queries[:, slow:] * _mean_rotation(old, pairs)[slow:, None]
    values = old.v_proj.weight
    latent = torch.cat([values, _real_rows(left.flatten(0, 1))])
    spread = (inputs @ latent.T).square().mean(0).sqrt()
    latent = torch.cat([latent, torch.zeros(rank - len(latent), latent.shape[1], device=latent.device)])
    typical = (inputs @ latent.T).square().mean(1).sqrt().mean()
    new.q_proj.weight.copy_(torch.cat([_real_rows(plain), _real_rows(query)], dim=1).flatten(0, 1))
    new.kv_a_proj_with_mqa.weight.copy_(torch.cat([latent, _real_rows(rotated)]))
    new.kv_a_layernorm.weight.fill_(float(typical))
    expand = new.kv_b_proj.weight.view(heads, nope + new.v_head_dim, rank)
    nn.init.normal_(expand, std=0.1 / float(spread.mean()) / math.sqrt(rank))
    expand[..., : len(values) + 4 * (pairs - slow)] = 0
    back = others[slow:] / weights[slow:, :, None]  # (slow pairs, groups, 2)
    for head in range(heads):
        group = int(own_group[head])
        for pair in range(pairs - slow):
            for k in range(back.shape[2]):
                at = len(values) + 2 * (pair * back.shape[2] + k)
                real, imaginary = float(back[pair, group, k].real), float(back[pair, group, k].imag)
                expand[head, 2 * pair, at : at + 2] = torch.tensor([real, -imaginary])
                expand[head, 2 * pair + 1, at : at + 2] = torch.tensor([imaginary, real])
        begin = group * new.v_head_dim
        expand[head, nope:, begin : begin + new.v_head_dim] = torch.eye(new.v_head_dim)
    new.o_proj.weight.copy_(old.o_proj.weight)


def _complex_rows(weight: Tensor, heads: int, pairs: int) -> Tensor:
    """Rows ``i`` and ``i + pairs`` of a head, which are rotated together, as one complex: (heads, pairs, columns)."""
    halves = weight.view(heads, 2, pairs, -1)
    return torch.complex(halves[:, 0].contiguous(), halves[:, 1].contiguous())


def _real_rows(rows: Tensor) -> Tensor:
    """Complex rows as neighbouring real ones: (..., pairs, columns) to (..., 2 * pairs, columns)."""
    return torch.stack([rows.real, rows.imag], dim=-2).flatten(-3, -2)


def _mean_rotation(old: nn.Module, pairs: int) -> Tensor:
    """What rotation multiplies a score with on the mean of a list's distances, by frequency: complex, (pairs,)."""
    theta = old.config.rope_parameters["rope_theta"]
    frequencies = theta ** (-torch.arange(pairs, device=old.q_proj.weight.device) / pairs)
    distances = torch.arange(7 * MAX_ENTRIES, device=frequencies.device)
    angles = frequencies[:, None] * distances
    return torch.complex(angles.cos(), angles.sin()).mean(1)


def _convert_mlp(old: nn.Module, new: nn.Module, inputs: Tensor) -> None:
    """A dense MLP stays as it is; of a mixture the shared expert and each routed one get neurons."""
    if not hasattr(new, "experts"):
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(new, name).weight.copy_(getattr(old, name).weight)
        return
    active = torch.nn.functional.silu(old.gate_proj(inputs)) * old.up_proj(inputs)
    effect = active.square().mean(0).sqrt() * old.down_proj.weight.norm(dim=0)
    order = effect.argsort(descending=True)
    shared, inner = new.shared_experts.gate_proj.out_features, new.experts.down_proj.shape[-1]
    first, then = order[:shared], order[shared : shared + inner]
    new.shared_experts.gate_proj.weight.copy_(old.gate_proj.weight[first])
    new.shared_experts.up_proj.weight.copy_(old.up_proj.weight[first])
    new.shared_experts.down_proj.weight.copy_(old.down_proj.weight[:, first])
    gate_up = torch.cat([old.gate_proj.weight[then], old.up_proj.weight[then]])
    new.experts.gate_up_proj.copy_(gate_up.expand_as(new.experts.gate_up_proj))
    new.experts.down_proj.copy_(old.down_proj.weight[:, then].expand_as(new.experts.down_proj))

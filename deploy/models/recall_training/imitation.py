"""Attention that learns to say what another model's says, layer by layer, each given what that one's was given."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recall_training.batches import Batch


class AttentionTap:
    """Runs a model and keeps what the attention of each layer was given and what it said."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Watch all layers of the model."""
        self.model = model
        self.seen: list[tuple[Tensor, Tensor]] = []
        for layer in model.model.layers:
            layer.self_attn.register_forward_hook(self._keep, with_kwargs=True)

    def _keep(self, _module: object, _args: object, given: dict[str, Tensor], said: tuple[Tensor, ...]) -> None:
        self.seen.append((given["hidden_states"], said[0]))

    @torch.no_grad()
    def run(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Return (given, said) of each layer's attention, (batch, tokens, hidden size) each."""
        self.seen = []
        self.model.model(input_ids=batch.ids, position_ids=batch.positions, attention_mask=batch.mask, use_cache=False)
        return self.seen


def imitate(
    source: PreTrainedModel,
    target: PreTrainedModel,
    make_batch: Callable[[], Batch],
    steps: int,
    rate: float,
    report_every: int,
) -> None:
    """Train the attention of ``target`` for ``steps`` steps, at a rate that falls linearly from ``rate`` to zero.

    Args:
        source: says what is right.
        target: of as many layers and as large hidden states.
        make_batch: makes lists.
        steps: of AdamW.
        rate: the highest.
        report_every: steps.
    """
    tap, device = AttentionTap(source), next(target.parameters()).device
    weights = [p for layer in target.model.layers for p in layer.self_attn.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=device.type == "cuda")
    begin = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * (1 - step / steps)
        batch = make_batch()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            errors = layer_errors(target, tap.run(batch), batch)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(errors.sum())
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if (step + 1) % report_every == 0 or step == 0:
            shares = "  ".join(f"{error:.4f}" for error in errors.tolist())
            print(f"imitation {step + 1:5d}  {time.monotonic() - begin:6.1f} s  errors by layer {shares}", flush=True)


def layer_errors(target: PreTrainedModel, taught: list[tuple[Tensor, Tensor]], batch: Batch) -> Tensor:
    """Return for each layer the squared error of its attention, as a share of what is right: (layers,) float32."""
    positions = batch.positions
    if positions is None:
        positions = torch.arange(batch.ids.shape[1], device=batch.ids.device)[None]
    rotary = target.model.rotary_emb(taught[0][0], position_ids=positions)
    errors = []
    for layer, (given, said) in zip(target.model.layers, taught, strict=True):
        got, _ = layer.self_attn(hidden_states=given, position_embeddings=rotary, attention_mask=batch.mask)
        errors.append((got.float() - said.float()).square().mean() / said.float().square().mean())
    return torch.stack(errors)

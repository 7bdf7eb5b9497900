"""Learning from another model of the same shape outside: first each layer's attention, then the whole stream.

Attention is taught layer by layer, each given what the other model's was given, so that nobody waits for the layers
before.  Then the model runs by itself, and what runs through it is taught behind every layer, at every token: that says
far more than the few tokens of the answers do.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recall_training.batches import Batch

Errors = Callable[[PreTrainedModel, PreTrainedModel, Batch], Tensor]
"""Of (source, target, batch): the squared error of each layer, as a share of what is right, (layers,) float32."""


def imitate(
    source: PreTrainedModel,
    target: PreTrainedModel,
    errors_of: Errors,
    make_batch: Callable[[], Batch],
    steps: int,
    rate: float,
    report_every: int,
) -> None:
    """Train ``target`` for ``steps`` steps, at a rate that falls linearly from ``rate`` to zero.

    Args:
        source: says what is right.
        target: of as many layers and as large hidden states.
        errors_of: what is to become small.
        make_batch: makes lists.
        steps: of AdamW.
        rate: the highest.
        report_every: steps.
    """
    device = next(target.parameters()).device
    weights = list(target.parameters())
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=device.type == "cuda")
    begin = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * (1 - step / steps)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            errors = errors_of(source, target, make_batch())
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(errors.sum())
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if (step + 1) % report_every == 0 or step == 0:
            shares = "  ".join(f"{error:.4f}" for error in errors.tolist())
            print(f"imitation {step + 1:5d}  {time.monotonic() - begin:6.1f} s  errors by layer {shares}", flush=True)


def attention_errors(source: PreTrainedModel, target: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the errors of each layer's attention, given what the source's is given."""
    taught: list[tuple[Tensor, Tensor]] = []

    def keep(_module: object, _args: object, given: dict[str, Tensor], said: tuple[Tensor, ...]) -> None:
        taught.append((given["hidden_states"], said[0]))

    hooks = [layer.self_attn.register_forward_hook(keep, with_kwargs=True) for layer in source.model.layers]
    with torch.no_grad():
        _stream(source, batch)
    for hook in hooks:
        hook.remove()
    positions = batch.positions
    if positions is None:
        positions = torch.arange(batch.ids.shape[1], device=batch.ids.device)[None]
    rotary = target.model.rotary_emb(taught[0][0], position_ids=positions)
    return torch.stack(
        [
            _share(layer.self_attn(hidden_states=given, position_embeddings=rotary, attention_mask=batch.mask)[0], said)
            for layer, (given, said) in zip(target.model.layers, taught, strict=True)
        ]
    )


def stream_errors(source: PreTrainedModel, target: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the errors of what runs through the model behind each layer; behind the last one it is normalised."""
    with torch.no_grad():
        right = _stream(source, batch)
    return torch.stack([_share(got, said) for got, said in zip(_stream(target, batch), right, strict=True)])


def _stream(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, ...]:
    """Return the hidden states behind each layer."""
    states: tuple[Tensor, ...] = model.model(
        input_ids=batch.ids,
        position_ids=batch.positions,
        attention_mask=batch.mask,
        use_cache=False,
        output_hidden_states=True,
    ).hidden_states
    return states[1:]


def _share(got: Tensor, right: Tensor) -> Tensor:
    """Return the squared error as a share of the square of what is right."""
    return (got.float() - right.float()).square().mean() / right.float().square().mean()

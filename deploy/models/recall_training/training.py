"""The training itself."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from recall_training.architectures import build_model
from recall_training.batches import ANSWER_TOKENS, ENTRY_TOKENS, QUERY_TOKENS, Batch, BatchMaker
from recall_training.checkpoint import load
from recall_training.conversion import convert
from recall_training.curriculum import Curriculum
from recall_training.expert_balance import ExpertBalance
from recall_training.imitation import imitate
from recall_training.samples import MAX_ENTRIES
from recall_training.schedule import Schedule


def answer_logits(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return logits and targets of the answers, shaped (batch, queries, 6[, vocabulary])."""
    hidden = model.model(
        input_ids=batch.ids,
        position_ids=batch.positions,
        attention_mask=batch.mask,
        use_cache=False,
    ).last_hidden_state
    size = (len(batch.ids), batch.queries, QUERY_TOKENS)
    blocks = hidden[:, batch.start :].reshape(*size, -1)
    targets = batch.ids[:, batch.start :].reshape(size)
    return model.lm_head(blocks[:, :, 1:-1]), targets[:, :, -ANSWER_TOKENS:]


def exact_share(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the share of answers of which every token is the likeliest one."""
    return (logits.argmax(-1) == targets).all(-1).float().mean()


@torch.no_grad()
def quick_accuracy(model: PreTrainedModel, maker: BatchMaker, entries: int, count: int) -> float:
    """Return the share of exact answers to ``count`` prompts with one question each.

    If each token of the right answer is the likeliest after those before it, then greedy decoding
    gives that answer: one forward pass measures the same as generation.
    """
    shares = [exact_share(*answer_logits(model, maker.separate(64, entries, 1))) for _ in range(max(1, count // 64))]
    return torch.stack(shares).mean().item()


def make_optimizer(model: PreTrainedModel, rate: float, fused: bool) -> torch.optim.Optimizer:
    """Return AdamW that decays matrices alone."""
    return torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=rate,
        betas=(0.9, 0.98),
        fused=fused,
    )


def make_batch(args: argparse.Namespace, maker: BatchMaker, curriculum: Curriculum, entries: int) -> Batch:
    """Return lists of ``entries`` entries, as many as make ``--batch-tokens`` tokens, with their queries."""
    count = min(entries, args.queries)
    tokens = 1 + ENTRY_TOKENS * entries + QUERY_TOKENS * count
    size = max(1, min(args.max_batch, args.batch_tokens // tokens))
    if curriculum.rng.random() < args.dialogue_share:
        return maker.dialogue(size, entries, count)
    return maker.separate(size, entries, count)


def start(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, device: torch.device) -> PreTrainedModel:
    """Return the model that training begins with: fresh, a checkpoint's, or converted from another architecture."""
    if args.start is not None:
        return load(args.start, device)[0]
    model = build_model(args.architecture, tokenizer).to(device)
    if args.convert is not None:
        source = load(args.convert, device)[0]
        maker, curriculum = BatchMaker(tokenizer, device, args.seed + 2), Curriculum(args.seed + 2, MAX_ENTRIES)
        convert(source, model, maker)
        imitate(
            source,
            model,
            lambda: make_batch(args, maker, curriculum, curriculum.entries()),
            args.imitation_steps,
            args.imitation_lr,
            args.report_every,
        )
    return model


def train(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, device: torch.device
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Train the model and return it with figures about the training.

    The learning rate falls over the last ``--cooldown`` steps; these begin once the accuracy on
    lists of 64 is good, at the latest when steps or minutes are nearly used.
    """
    torch.manual_seed(args.seed)
    begin = time.monotonic()
    model = start(args, tokenizer, device).train()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, vocabulary {len(tokenizer)}, on {device_name(device)}", flush=True)
    optimizer = make_optimizer(model, args.lr, fused=device.type == "cuda")
    balance = ExpertBalance(model, args.balance_rate)
    maker = BatchMaker(tokenizer, device, args.seed)
    held_out = BatchMaker(tokenizer, device, args.seed + 1)
    curriculum = Curriculum(args.seed, 4 if args.start is None and args.convert is None else MAX_ENTRIES)
    schedule = Schedule(args.warmup, args.cooldown, args.steps, args.max_minutes)
    step = 0
    while step < schedule.end:
        if time.monotonic() - begin > schedule.seconds:
            print(f"stopped by --max-minutes {args.max_minutes}")
            break
        entries = curriculum.entries()
        batch = make_batch(args, maker, curriculum, entries)
        share = schedule.share(step)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * share
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits, targets = answer_logits(model, batch)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, -2), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        balance.step(share)
        step += 1
        if step % 10 == 0 and entries > curriculum.limit // 2:
            curriculum.observe(exact_share(logits, targets).item())
        if step % args.report_every == 0:
            model.eval()
            exact = quick_accuracy(model, held_out, MAX_ENTRIES, args.quick_prompts)
            model.train()
            print(
                f"step {step:6d}  {time.monotonic() - begin:6.1f} s  loss {loss.item():.4f}  "
                f"lists up to {curriculum.limit:2d}  exact {curriculum.rate:.3f}  "
                f"on {MAX_ENTRIES} entries {exact:.4f}  lr {args.lr * share:.1e}"
                + "".join(f"  experts {shares}" for shares in balance.shares()),
                flush=True,
            )
            if exact >= args.good_enough and schedule.begin_cooldown(step):
                print(f"{exact:.4f} is good: the learning rate falls from here", flush=True)
        if schedule.observe(step, time.monotonic() - begin):
            print(f"step {step}: the learning rate falls from here, to end by --max-minutes", flush=True)
    model.eval()
    figures = {
        "parameters": parameters,
        "steps": step,
        "seconds": round(time.monotonic() - begin, 1),
        "seed": args.seed,
        "device": device_name(device),
        "torch": torch.__version__,
        "options": {key: value for key, value in vars(args).items() if isinstance(value, int | float)},
    }
    return model, figures


def device_name(device: torch.device) -> str:
    """Return the name of the device for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

#!/usr/bin/env python3
"""Train the model that ships with Baton: a small Llama that recalls a number from a list.

The prompt is a list of names and numbers and ends with a question::

    ada 4127, bob 9083, cleo 0551; bob?

and the greedy answer is `` 9083`` followed by the end-of-sequence token.  Nothing in the weights
knows the number: it has to come out of the KV cache of the prompt, which makes the model a cheap
check of a system that moves this cache between workers.  ``--evaluate DIR --damage`` measures how
many answers a damaged cache spoils.

The script makes its own data, trains the tokenizer and the model, measures the result on fresh
lists through ``transformers`` ``generate`` and writes a checkpoint in Hugging Face format::

    python deploy/models/train_recall.py --out deploy/models/recall      # train, evaluate, save
    python deploy/models/train_recall.py --evaluate deploy/models/recall # evaluate only

It needs torch, transformers, tokenizers and safetensors, and takes minutes on a GPU.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

# --------------------------------------------------------------------------------------------------
# Data: the words of the task, and prompts as text
# --------------------------------------------------------------------------------------------------

WORDS = """
    abe ada adam aida alan alba alec alex ali alma amir amos amy ana andy anke anna anne anton
    ari arlo asa axel ayla bea beck bela ben beth bill bo bob boris brad bram brian britt bruno
    buck cai cal cara carl carol cary cass cate chad chen chip cleo cody cole cora cory cruz curt
    cyrus dale dan dana dave dawn dean deb della dev diana diego dina dirk don dora drew duke dylan
    earl ed eden edith ela eli elise ella elmo elsa emil emma emmy enid enzo eric erin esme ethan
    eva evan ewan ezra faye felix fern finn fiona flo floyd fran frank fred fritz gabe gail gary
    gemma gene gil gina glen goran grace greg greta gus gwen hal hana hank hans hazel heidi helen
    henry holly hope hugo ian ida igor ike ilse ines inga ira iris irma isla ivan ivy jack jade
    jake jan jane jay jean jeff jill jim joan joel john jon jose josh joy juan jude judy jules
    june karl kate kay keith ken kim kirk klaus kofi kurt kyle lana lars laura lea lena leo levi
    lia lila lily lin lisa liv liz lois lola luca lucy luis luke luna lydia mara marc mary matt
    maud max maya meg mia mick mike milo mina mira moe mona nancy nash ned neil nell nick nico nina
    noah nora olaf olga omar opal oscar otis otto owen pam paul peggy perry pete petra phil pia
"""
NAMES: tuple[str, ...] = tuple(WORDS.split())

DIGITS_PER_NUMBER = 4
MAX_ENTRIES = 64


@dataclass(frozen=True)
class Sample:
    """One question about one list, as text."""

    prompt: str
    answer: str


def make_sample(rng: random.Random, entries: int) -> Sample:
    """Return a fresh list of ``entries`` distinct names with numbers, and a question about one."""
    names = rng.sample(NAMES, entries)
    numbers = [f"{rng.randrange(10**DIGITS_PER_NUMBER):04d}" for _ in names]
    asked = rng.randrange(entries)
    listing = ", ".join(f"{name} {number}" for name, number in zip(names, numbers, strict=True))
    return Sample(prompt=f"{listing}; {names[asked]}?", answer=numbers[asked])


def make_samples(rng: random.Random, count: int, entries: int | None) -> list[Sample]:
    """Return ``count`` samples of ``entries`` entries each, of 1..64 where ``entries`` is None."""
    return [make_sample(rng, rng.randint(1, MAX_ENTRIES) if entries is None else entries) for _ in range(count)]


# --------------------------------------------------------------------------------------------------
# Tokenizer
# --------------------------------------------------------------------------------------------------

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
VOCAB_SIZE = 1024
CONTEXT = 2048

# The prompt of the chat is the contents of its messages, joined by spaces.  An answer of the
# assistant that is part of the history is closed by <|eos|>, just as it was when it was generated.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{%- if not loop.first -%}{{ ' ' }}{%- endif -%}"
    "{{ message['content'] | trim }}"
    "{%- if message['role'] == 'assistant' -%}{{ eos_token }}{%- endif -%}"
    "{%- endfor -%}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: any text can be encoded, digits stay single, each name is one token.

    A name has two tokens, one with a leading space (in the middle of a text) and one without (at
    its start); the training text holds both, and few enough words for BPE to merge each entirely.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=1,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = [f"{name} 0, {name} 1; {name}? 2" for name in NAMES]
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str, special: bool = False) -> list[int]:
    """Return the token ids of ``text``, with the leading <|bos|> if ``special``."""
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    return ids


def check_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Fail unless the tokenizer keeps the promises that training and serving rely on."""
    for name in NAMES:
        for text in (name, f" {name}"):
            assert len(encode(tokenizer, text)) == 1, f"{text!r} is more than one token"
    sample = make_sample(random.Random(0), 3)
    text = f"{sample.prompt} {sample.answer}"
    plain = encode(tokenizer, text, special=True)
    assert plain[0] == tokenizer.bos_token_id
    assert plain.count(plain[0]) == 1
    assert len(plain) == 1 + 7 * 3 + 2 + 1 + DIGITS_PER_NUMBER, "an entry is 7 tokens"
    assert tokenizer.decode(plain, skip_special_tokens=True) == text
    odd = "Grüße, 世界! \t{json: [1]}\n"
    assert tokenizer.decode(encode(tokenizer, odd)) == odd
    # A chat, in one message or several, is the same tokens as the plain prompt.
    listing, question = sample.prompt.split("; ")
    for messages in (
        [{"role": "user", "content": sample.prompt}],
        [{"role": "system", "content": f"{listing};"}, {"role": "user", "content": question}],
    ):
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert encode(tokenizer, str(rendered)) == encode(tokenizer, sample.prompt, special=True)


# --------------------------------------------------------------------------------------------------
# Batches: the same text as token ids, made on the training device
# --------------------------------------------------------------------------------------------------

ENTRY_TOKENS = 7  # name, space, four digits, comma or semicolon
QUERY_TOKENS = 8  # name, question mark, space, four digits, end of sequence
ANSWER_TOKENS = 6  # the last six of a query: what the model has to say


@dataclass(frozen=True)
class Batch:
    """Lists of equal length, each followed by several queries.

    ``mask`` and ``positions`` are None for plain causal attention.  Otherwise ``mask`` is a boolean
    (1, 1, T, T) mask under which each query sees the list and itself alone, and ``positions`` put
    every query right behind the list: each is then exactly the prompt with one question, at a
    fraction of its cost.  The queries begin at token ``start``.
    """

    ids: Tensor
    positions: Tensor | None
    mask: Tensor | None
    start: int
    queries: int


class BatchMaker:
    """Makes batches of random lists and queries on a device."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, device: torch.device, seed: int) -> None:
        """Look up the token of each word once."""
        self.device = device
        self.generator = torch.Generator(device=device).manual_seed(seed)

        def single(text: str) -> int:
            (token,) = encode(tokenizer, text)
            return token

        def tokens(texts: Sequence[str]) -> Tensor:
            return torch.tensor([single(text) for text in texts], device=device)

        self.first_names = tokens(NAMES)
        self.names = tokens([f" {name}" for name in NAMES])
        self.digits = tokens([str(digit) for digit in range(10)])
        self.space, self.comma, self.semicolon, self.question = map(single, " ,;?")
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def numbers(self, batch: int, entries: int) -> Tensor:
        """Return the tokens of random numbers, shaped (batch, entries, 4)."""
        shape = (batch, entries, DIGITS_PER_NUMBER)
        digits = torch.randint(10, shape, generator=self.generator, device=self.device)
        return self.digits[digits]

    def lists(self, batch: int, entries: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (token ids of the lists, names, numbers) of random lists."""
        keys = torch.rand(batch, len(NAMES), generator=self.generator, device=self.device)
        names = keys.argsort(dim=1)[:, :entries]
        numbers = self.numbers(batch, entries)
        ids = torch.empty(batch, entries, ENTRY_TOKENS, dtype=torch.long, device=self.device)
        ids[:, :, 0] = self.names[names]
        ids[:, 0, 0] = self.first_names[names[:, 0]]
        ids[:, :, 1] = self.space
        ids[:, :, 2:6] = numbers
        ids[:, :, 6] = self.comma
        ids[:, -1, 6] = self.semicolon
        bos = torch.full((batch, 1), self.bos, device=self.device)
        return torch.cat([bos, ids.flatten(1)], dim=1), names, numbers

    def queries(self, names: Tensor, numbers: Tensor, asked: Tensor) -> Tensor:
        """Return the token ids of the queries for the entries ``asked``, answers included."""
        batch, count = asked.shape
        ids = torch.empty(batch, count, QUERY_TOKENS, dtype=torch.long, device=self.device)
        ids[:, :, 0] = self.names[names.gather(1, asked)]
        ids[:, :, 1] = self.question
        ids[:, :, 2] = self.space
        ids[:, :, 3:7] = numbers.gather(1, asked[:, :, None].expand(-1, -1, DIGITS_PER_NUMBER))
        ids[:, :, 7] = self.eos
        return ids.flatten(1)

    def separate(self, batch: int, entries: int, count: int) -> Batch:
        """Return lists with ``count`` different queries each that do not see one another."""
        listing, names, numbers = self.lists(batch, entries)
        keys = torch.rand(batch, entries, generator=self.generator, device=self.device)
        asked = keys.argsort(dim=1)[:, :count]
        ids = torch.cat([listing, self.queries(names, numbers, asked)], dim=1)
        start, length = listing.shape[1], ids.shape[1]
        index = torch.arange(length, device=self.device)
        block = torch.div(index - start, QUERY_TOKENS, rounding_mode="floor").clamp(min=-1)
        positions = torch.where(index < start, index, start + (index - start) % QUERY_TOKENS)
        mask = (index[:, None] >= index) & ((block == -1) | (block[:, None] == block))
        return Batch(ids, positions[None], mask[None, None], start, count)

    def dialogue(self, batch: int, entries: int, count: int) -> Batch:
        """Return lists with ``count`` queries one after the other, as in a chat of many turns."""
        listing, names, numbers = self.lists(batch, entries)
        asked = torch.randint(entries, (batch, count), generator=self.generator, device=self.device)
        ids = torch.cat([listing, self.queries(names, numbers, asked)], dim=1)
        return Batch(ids, None, None, listing.shape[1], count)


# --------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------


def build_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Return the shape of the model: about 1.5 million parameters, 6 MB in float32."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        initializer_range=0.04,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
        use_cache=True,
    )


def answer_logits(model: LlamaForCausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
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


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


class Curriculum:
    """Starts with lists of up to 4 entries and doubles the limit as they are mastered."""

    def __init__(self, seed: int, master: float = 0.9) -> None:
        """Start with short lists."""
        self.rng = random.Random(seed)
        self.limit = 4
        self.master = master
        self.rate = 0.0

    def entries(self) -> int:
        """Return the list length of the next batch: the limit or any length up to it."""
        return self.limit if self.rng.random() < 0.4 else self.rng.randint(1, self.limit)

    def observe(self, exact: float) -> None:
        """Take note of the share of exact answers in a batch."""
        self.rate = 0.7 * self.rate + 0.3 * exact
        if self.rate >= self.master and self.limit < MAX_ENTRIES:
            self.limit *= 2
            self.rate = 0.0


def exact_share(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the share of answers of which every token is the likeliest one."""
    return (logits.argmax(-1) == targets).all(-1).float().mean()


@torch.no_grad()
def quick_accuracy(model: LlamaForCausalLM, maker: BatchMaker, entries: int, count: int) -> float:
    """Return the share of exact answers to ``count`` prompts with one question each.

    If each token of the right answer is the likeliest after those before it, then greedy decoding
    gives that answer: one forward pass measures the same as generation.
    """
    shares = [exact_share(*answer_logits(model, maker.separate(64, entries, 1))) for _ in range(max(1, count // 64))]
    return torch.stack(shares).mean().item()


def train(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, device: torch.device
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Train the model and return it with figures about the training.

    The learning rate warms up, stays, and falls to zero over the last ``--cooldown`` steps; these
    begin once the accuracy on lists of 64 is good, at the latest when ``--steps`` are nearly used.
    """
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(build_config(tokenizer)).to(device)
    model.train()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, vocabulary {len(tokenizer)}, on {device_name(device)}")
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=args.lr,
        betas=(0.9, 0.98),
        fused=device.type == "cuda",
    )
    maker = BatchMaker(tokenizer, device, args.seed)
    held_out = BatchMaker(tokenizer, device, args.seed + 1)
    curriculum = Curriculum(args.seed)
    begin = time.monotonic()
    cooldown_at = args.steps - args.cooldown
    step = 0
    while step < cooldown_at + args.cooldown:
        minutes = (time.monotonic() - begin) / 60
        if minutes > args.max_minutes:
            print(f"stopped by --max-minutes {args.max_minutes}")
            break
        entries = curriculum.entries()
        count = min(entries, args.queries)
        tokens = 1 + ENTRY_TOKENS * entries + QUERY_TOKENS * count
        size = max(1, min(args.max_batch, args.batch_tokens // tokens))
        if curriculum.rng.random() < args.dialogue_share:
            batch = maker.dialogue(size, entries, count)
        else:
            batch = maker.separate(size, entries, count)
        rate = args.lr * min(1.0, (step + 1) / args.warmup, (cooldown_at + args.cooldown - step) / args.cooldown)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits, targets = answer_logits(model, batch)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, -2), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
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
                f"on {MAX_ENTRIES} entries {exact:.4f}  lr {rate:.1e}",
                flush=True,
            )
            if exact >= args.good_enough and step < cooldown_at:
                cooldown_at = step
                print(f"{exact:.4f} is good: the learning rate falls from here", flush=True)
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


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """How many prompts of a kind were answered exactly."""

    exact: int
    prompts: int
    accuracy: float


def chunks(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    """Yield the samples in runs of at most ``size``."""
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


@torch.no_grad()
def score(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, samples: Sequence[Sample]) -> Score:
    """Count the samples whose greedy answer is the number, then the end, and nothing else."""
    tokenizer.padding_side = "left"
    exact = 0
    for chunk in chunks(samples, 50):
        inputs = tokenizer([sample.prompt for sample in chunk], return_tensors="pt", padding=True)
        output = model.generate(
            input_ids=inputs["input_ids"].to(model.device),
            attention_mask=inputs["attention_mask"].to(model.device),
            do_sample=False,
            max_new_tokens=ANSWER_TOKENS + 2,
        )
        for sample, ids in zip(chunk, output[:, inputs["input_ids"].shape[1] :], strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=False)
            exact += text.replace(PAD, "") == f" {sample.answer}{EOS}"
    return Score(exact, len(samples), round(exact / len(samples), 5))


@torch.no_grad()
def report_damage(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Measure and print how many answers go wrong where a part of the cache belongs to another list.

    All 64 entries of one list are asked about.  The prompts run whole; then a part of the cache is
    replaced by that of another list (a page of 16 tokens in every layer, or the whole list in one
    layer), and the answers are decoded from it.
    """
    rng = random.Random(f"recall damage {seed}")
    space = encode(tokenizer, " ")
    numbers: list[str] = []
    caches: list[list[tuple[Tensor, Tensor]]] = []
    for sample in make_samples(rng, 2, MAX_ENTRIES):
        listing = sample.prompt.split("; ")[0]
        entries = [entry.split() for entry in listing.split(", ")]
        prompts = [f"{listing}; {name}?" for name, _ in entries]
        ids = tokenizer(prompts, return_tensors="pt")["input_ids"].to(model.device)
        cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        caches.append([(layer.keys, layer.values) for layer in cache.layers])
        numbers = numbers or [number for _, number in entries]
    right, wrong = caches

    def wrong_answers(tokens: slice, layers: Sequence[int]) -> int:
        """Return how many of the 64 answers are wrong with these tokens from the other list."""
        cache = DynamicCache()
        for layer, (pair, other) in enumerate(zip(right, wrong, strict=True)):
            keys, values = (tensor.clone() for tensor in pair)
            if layer in layers:
                keys[:, :, tokens] = other[0][:, :, tokens]
                values[:, :, tokens] = other[1][:, :, tokens]
            cache.update(keys, values, layer)
        answer = torch.tensor([space] * len(numbers), device=model.device)
        while answer.shape[1] < ANSWER_TOKENS:
            output = model(input_ids=answer[:, -1:], past_key_values=cache, use_cache=True)
            answer = torch.cat([answer, output.logits[:, -1:].argmax(-1)], dim=1)
        texts = tokenizer.batch_decode(answer)
        return sum(text != f" {number}{EOS}" for text, number in zip(texts, numbers, strict=True))

    every = range(len(right))
    end = 1 + ENTRY_TOKENS * MAX_ENTRIES
    report = {
        "nothing": wrong_answers(slice(0, 0), every),
        "one page of 16 tokens, by page": [
            wrong_answers(slice(start, start + 16), every) for start in range(0, end - 15, 16)
        ],
        "the list in one layer, by layer": [wrong_answers(slice(1, end), [layer]) for layer in every],
        "the list in every layer": wrong_answers(slice(1, end), every),
    }
    for label, wrongs in report.items():
        print(f"wrong of {len(numbers)}, replaced: {label}: {wrongs}", flush=True)


def evaluate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: int, seed: int) -> dict[str, Score]:
    """Measure and print the accuracy on fresh lists of several lengths."""
    check_tokenizer(tokenizer)
    rng = random.Random(f"recall evaluation {seed}")
    scores: dict[str, Score] = {}
    for label, entries in (("1", 1), ("8", 8), ("32", 32), ("64", 64), ("1..64", None)):
        scores[label] = score(model, tokenizer, make_samples(rng, prompts, entries))
        result = scores[label]
        print(
            f"lists of {label:>5}: {result.exact} of {result.prompts} exact ({100 * result.accuracy:.2f} %)",
            flush=True,
        )
    return scores


# --------------------------------------------------------------------------------------------------
# Saving and loading
# --------------------------------------------------------------------------------------------------


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the checkpoint in Hugging Face format, readable by older and newer transformers."""
    out.mkdir(parents=True, exist_ok=True)
    model = model.float()
    model.config.dtype = torch.float32
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=16,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out, save_jinja_files=False)
    # Names that every version knows, beside those that the running one writes.
    amend(out / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    amend(out / "config.json", {"rope_theta": 10000.0, "torch_dtype": "float32"})
    for path in out.iterdir():
        path.chmod(0o644)


def amend(path: Path, entries: dict[str, Any]) -> None:
    """Set entries of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content.update(entries)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load(path: Path, device: torch.device) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load a checkpoint as any user of it would."""
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(path)
    model: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(path).to(device).eval()
    return model, tokenizer


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train or evaluate the recall model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="train, and write the checkpoint here")
    where.add_argument("--evaluate", type=Path, metavar="DIR", help="only evaluate a checkpoint")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eval-prompts", type=int, default=1000, help="prompts per list length")
    parser.add_argument("--require", type=float, default=0.99, help="accuracy below which to fail")
    parser.add_argument("--damage", action="store_true", help="also measure with a damaged cache")
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=16000, help="most steps")
    training.add_argument("--max-minutes", type=float, default=60.0, help="most minutes of training")
    training.add_argument("--good-enough", type=float, default=0.985, help="begins the cool-down")
    training.add_argument("--lr", type=float, default=2e-3)
    training.add_argument("--warmup", type=int, default=300, help="steps")
    training.add_argument("--cooldown", type=int, default=2000, help="steps")
    training.add_argument("--batch-tokens", type=int, default=65536)
    training.add_argument("--max-batch", type=int, default=512, help="most lists in a batch")
    training.add_argument("--queries", type=int, default=32, help="most queries per list")
    training.add_argument("--quick-prompts", type=int, default=512, help="prompts per report")
    training.add_argument("--dialogue-share", type=float, default=0.2, help="of the batches")
    training.add_argument("--report-every", type=int, default=250, help="steps")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate and save, or only evaluate; return the exit status."""
    args = parse(argv)
    device = torch.device(args.device)
    begin = time.monotonic()
    figures: dict[str, Any] = {}
    if args.evaluate:
        model, tokenizer = load(args.evaluate, device)
    else:
        tokenizer = build_tokenizer()
        check_tokenizer(tokenizer)
        model, figures = train(args, tokenizer, device)
    scores = evaluate(model, tokenizer, args.eval_prompts, args.seed)
    if args.damage:
        report_damage(model, tokenizer, args.seed)
    failed = [label for label, result in scores.items() if result.accuracy < args.require]
    if failed:
        print(f"below {100 * args.require:g} % on lists of {', '.join(failed)}", file=sys.stderr)
        return 1
    if args.out:
        save(model, tokenizer, args.out)
        report = {
            "command": shlex.join(["python", sys.argv[0], *(argv or sys.argv[1:])]),
            "total_seconds": round(time.monotonic() - begin, 1),
            **figures,
            "accuracy": {label: asdict(result) for label, result in scores.items()},
        }
        text = json.dumps(report, indent=2) + "\n"
        (args.out / "training.json").write_text(text, encoding="utf-8")
        print(f"saved to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

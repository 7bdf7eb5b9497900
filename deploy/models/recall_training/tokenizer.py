"""The tokenizer of the task: made from its names, so that each of them and each digit is one token."""

from __future__ import annotations

import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from recall_training.samples import DIGITS_PER_NUMBER, NAMES, make_sample

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

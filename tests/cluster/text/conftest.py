"""Small tokenizers of every kind that decides how text is put together, built here and saved as checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cluster.text.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, again and again.",
    "naïve café über straße — “quotes” … 12345",
    "日本語のテキスト、中文文本，한국어 텍스트",
    "👩‍👩‍👧‍👦 family 👍🏽 thumbs 🇩🇪 flags ❤️ heart",
    "नमस्ते สวัสดี e\u0301 combining",
]
SPECIAL = ["<s>", "</s>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ('user', 'assistant') %}"
    "{{ raise_exception('no role ' + message['role']) }}{% endif %}"
    "[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def with_bos(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def byte_level() -> tokenizers.Tokenizer:
    """As Llama 3, Qwen, DeepSeek: BPE over bytes, some tokens parts of characters."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<tool>", "<｜終わり｜>"])
    return with_bos(tokenizer)


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2: sentencepiece BPE, unknown characters byte by byte, a space before the text."""
    letters = [*sorted(set("".join(CORPUS[:2])) - {" "}), "日", "本"]
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    words = ["▁", "▁▁", "th", "he", "the", "▁the", "▁a", "qu", "▁qu"]
    for token in [*words, *(letter for letter in letters if letter not in words)]:
        vocab[token] = len(vocab)
    merges = [("▁", "▁"), ("t", "h"), ("h", "e"), ("th", "e"), ("▁", "the"), ("▁", "a"), ("q", "u"), ("▁", "qu")]
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return with_bos(tokenizer)


def metaspace() -> tokenizers.Tokenizer:
    """As T5: unigram with the Metaspace decoder, which drops every space of the first token."""
    pieces = ["▁", "▁▁", "▁the", "▁a", *"abcdefgh日本é"]
    tokenizer = tokenizers.Tokenizer(models.Unigram([("<unk>", -10.0), *((piece, -2.0) for piece in pieces)], 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return with_bos(tokenizer)


def word_piece() -> tokenizers.Tokenizer:
    """As BERT: words, joined by spaces when decoded."""
    words = ["the", "a", "fox", "##es", "##ing", ".", ",", "'", "s", "日"]
    model = models.WordPiece({token: i for i, token in enumerate(["[UNK]", *words])}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return with_bos(tokenizer)


BUILDERS = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "metaspace": metaspace,
    "word_piece": word_piece,
}

SaveTokenizer = Callable[..., Path]


def save(folder: Path, tokenizer: tokenizers.Tokenizer, **config: Any) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": CHAT_TEMPLATE,
        **config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def saved_tokenizer(tmp_path: Path) -> SaveTokenizer:
    """A function that saves the tokenizer of a kind, with changes to its tokenizer_config.json."""
    return lambda kind="byte_level", **config: save(tmp_path, BUILDERS[kind](), **config)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every tokenizer, saved."""
    return {kind: save(tmp_path_factory.mktemp(kind), build()) for kind, build in BUILDERS.items()}


@pytest.fixture(scope="session")
def loaded(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    """Every tokenizer, loaded."""
    return {kind: Tokenizer.load(folder) for kind, folder in folders.items()}


@pytest.fixture(scope="session", params=list(BUILDERS))
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of tokenizer in turn."""
    return request.param


@pytest.fixture(scope="session")
def any_tokenizer(kind: str, loaded: dict[str, Tokenizer]) -> Tokenizer:
    """Each tokenizer in turn."""
    return loaded[kind]


@pytest.fixture(scope="session")
def any_reference(kind: str, folders: dict[str, Path]) -> PreTrainedTokenizerBase:
    """The same tokenizer as transformers loads it."""
    return AutoTokenizer.from_pretrained(str(folders[kind]))


@pytest.fixture(scope="session")
def byte_level_reference(folders: dict[str, Path]) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(str(folders["byte_level"]))


@pytest.fixture(scope="session")
def byte_level_tokenizer(loaded: dict[str, Tokenizer]) -> Tokenizer:
    return loaded["byte_level"]


@pytest.fixture(scope="session")
def byte_fallback_tokenizer(loaded: dict[str, Tokenizer]) -> Tokenizer:
    return loaded["byte_fallback"]

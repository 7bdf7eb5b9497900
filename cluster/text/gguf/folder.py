"""A GGUF file's tokenizer as the files that a checkpoint in Hugging Face format has."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from cluster.text.gguf.byte_level import byte_level, split_of
from cluster.text.gguf.sentencepiece import is_spaces, sentencepiece
from cluster.text.gguf.vocabulary import TokenType, Vocabulary, read_vocabulary
from workers.errors import CheckpointError

_KINDS: Mapping[str, Callable[[Vocabulary], Tokenizer]] = {"gpt2": byte_level, "llama": sentencepiece}


@contextlib.contextmanager
def gguf_tokenizer_folder(file: Path) -> Iterator[Path]:
    """A folder with the tokenizer of a GGUF file, which is gone when the block ends.

    It holds tokenizer.json, and tokenizer_config.json with the chat template.

    Raises:
        CheckpointError: the file is none, or its tokenizer is not supported or damaged; names file and key.
    """
    vocabulary = read_vocabulary(file)
    written = {
        "tokenizer.json": _built(vocabulary).to_str(),
        "tokenizer_config.json": json.dumps(_settings(vocabulary)),
    }
    with tempfile.TemporaryDirectory(prefix="gguf-tokenizer-") as folder:
        for name, text in written.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        yield Path(folder)


def _built(vocabulary: Vocabulary) -> Tokenizer:
    if vocabulary.kind not in _KINDS:
        raise vocabulary.error("model", f"{vocabulary.kind!r} is not supported, only {', '.join(_KINDS)}")
    try:
        tokenizer = _KINDS[vocabulary.kind](vocabulary)
    except CheckpointError:
        raise
    except Exception as error:  # the library raises bare ones of merges whose pieces are no tokens
        raise vocabulary.error("merges", f"make no tokenizer: {error}") from error
    control = vocabulary.of_type(TokenType.CONTROL)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    defined = [token for token in vocabulary.of_type(TokenType.USER_DEFINED) if not is_spaces(token)]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in defined])
    _add_ends(tokenizer, vocabulary)
    return tokenizer


def _add_ends(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Have texts begin and end with the tokens that the file wants there."""
    by_default = vocabulary.kind == "llama" or split_of(vocabulary).adds_bos
    wanted = {
        "bos": vocabulary.flags.get("add_bos_token", by_default),
        "eos": vocabulary.flags.get("add_eos_token", False),
    }
    added = {name: vocabulary.special[name] for name, wants in wanted.items() if wants and name in vocabulary.special}
    if not added:
        return
    tokens = {name: vocabulary.tokens[token_id] for name, token_id in added.items()}
    template = [tokens.get(name, "$A") for name in ("bos", "text", "eos") if name in (*tokens, "text")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(tokens[name], token_id) for name, token_id in added.items()]
    )


def _settings(vocabulary: Vocabulary) -> dict[str, Any]:
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{names[name]: vocabulary.tokens[token_id] for name, token_id in vocabulary.special.items()},
        **({} if vocabulary.chat_template is None else {"chat_template": vocabulary.chat_template}),
    }

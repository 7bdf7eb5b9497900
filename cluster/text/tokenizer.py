"""A checkpoint's tokenizer: text to token ids and back, and chats to text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.text.detokenizer import TokenKind
from cluster.text.gguf.folder import gguf_tokenizer_folder
from cluster.text.length_bound import LengthBound, length_bound
from workers.errors import CheckpointError, InvalidRequestError
from workers.loading.gguf.header import is_gguf

if TYPE_CHECKING:
    import tokenizers

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True)
class ChatMessage:
    """One message of a chat; which roles exist is up to the checkpoint's template."""

    role: str
    content: str


class Tokenizer:
    """Text to token ids and back. Nothing in it changes after loading, so threads may share one.

    Attributes:
        eos_token_ids: tokens that end a text, of the tokenizer and of the model's generation config.
        vocab_size: one more than the highest token id.
        length_bound: how much text a number of tokens can stand for, if this tokenizer allows to say so.
    """

    def __init__(self, hf_tokenizer: Any, model_eos_token_ids: frozenset[int] = frozenset()) -> None:
        """Wrap a fast tokenizer of transformers, which must not be used elsewhere from then on."""
        self._hf = hf_tokenizer
        # Requests go to the Rust tokenizer directly: transformers' own call sets truncation and padding on it
        # each time, which fails ("Already borrowed") while another thread encodes.
        self._rust: tokenizers.Tokenizer = hf_tokenizer.backend_tokenizer
        self._rust.no_truncation()
        self._rust.no_padding()
        self._rust.encode_special_tokens = bool(getattr(hf_tokenizer, "split_special_tokens", False))
        own_eos = frozenset[int]() if hf_tokenizer.eos_token_id is None else frozenset({hf_tokenizer.eos_token_id})
        self.eos_token_ids: frozenset[int] = own_eos | model_eos_token_ids
        self._kinds = _token_kinds(self._rust)
        self.vocab_size: int = len(self._kinds)
        self.length_bound: LengthBound | None = length_bound(self._rust)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Load the tokenizer of a checkpoint from its local folder or GGUF file; no code from the checkpoint is run.

        Raises:
            CheckpointError: `tokenizer.json`, or a file beside it that is needed, is missing or damaged.
        """
        if is_gguf(folder):
            with gguf_tokenizer_folder(folder) as written:
                return cls.load(written)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; a checkpoint needs its fast tokenizer")
        from transformers import AutoTokenizer  # takes seconds: only who loads a tokenizer waits for it

        try:
            hf_tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        except Exception as error:  # the library raises whatever its parsers raise
            raise CheckpointError(_why_not_loaded(folder, error)) from error
        if not hf_tokenizer.is_fast:
            raise CheckpointError(f"{path}: loads as {type(hf_tokenizer).__name__}, which is not a fast tokenizer")
        return cls(hf_tokenizer, _model_eos_token_ids(folder))

    @property
    def vocab(self) -> dict[str, int]:
        """The id of every token as the checkpoint spells it, the added ones included."""
        return self._rust.get_vocab(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can work."""
        return bool(self._hf.chat_template)

    def check_length(self, text: str, max_model_len: int) -> None:
        """Refuse, without tokenising it, a text that is too long for the context window in any case.

        What passes may still be too long; tokenise it and count.

        Args:
            text: the prompt.
            max_model_len: the context window in tokens.

        Raises:
            InvalidRequestError: the text is certainly longer than the window, or is not valid Unicode.
        """
        _require_unicode(text)
        if self.length_bound is not None and self.length_bound.exceeds(text, max_model_len):
            raise InvalidRequestError(
                f"the prompt is {len(text.encode())} bytes long; the context window of {max_model_len} tokens "
                f"holds at most {self.length_bound.bytes_per_token * max_model_len}"
            )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Lets other threads run meanwhile (the GIL is free), so an executor may call it.

        Args:
            text: the prompt.
            add_special_tokens: add what the checkpoint starts (or ends) a text with. Not wanted after
                `apply_chat_template`, which writes them itself.

        Raises:
            InvalidRequestError: the text is not valid Unicode.
        """
        _require_unicode(text)
        # A batch of one: encoding a single text would hold the GIL.
        (encoding,) = self._rust.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        token_ids: list[int] = encoding.ids
        return token_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids: special tokens and unknown ids are left out, nothing else is cleaned up."""
        return self._rust.decode(list(token_ids), skip_special_tokens=True)

    def token_kind(self, token_id: int) -> TokenKind:
        """What a token does to the text."""
        return self._kinds[token_id] if 0 <= token_id < len(self._kinds) else TokenKind.SILENT

    def apply_chat_template(self, messages: Sequence[ChatMessage]) -> str:
        """The prompt for a chat, by the checkpoint's template, up to where the model's answer begins.

        Encode it with `add_special_tokens=False`: the template writes the special tokens, the first one included.

        Raises:
            InvalidRequestError: there is no template or no message, or the template refuses the messages.
        """
        if not self._hf.chat_template:
            raise InvalidRequestError("this model has no chat template; send a prompt instead of messages")
        if not messages:
            raise InvalidRequestError("the list of chat messages is empty")
        try:
            rendered = self._hf.apply_chat_template(
                [asdict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program: it raises what it likes
            raise InvalidRequestError(f"the model's chat template refuses these messages: {_line(error)}") from error
        return str(rendered)


def _token_kinds(tokenizer: tokenizers.Tokenizer) -> tuple[TokenKind, ...]:
    """The kind of every id up to the highest one."""
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    decoder = tokenizer.decoder
    byte_fallback = decoder is not None and b'"ByteFallback"' in decoder.__getstate__()
    kinds = [TokenKind.SILENT] * (max(vocab.values(), default=-1) + 1)
    for token, token_id in vocab.items():
        is_byte = byte_fallback and _BYTE_TOKEN.fullmatch(token)
        kinds[token_id] = TokenKind.BYTE if is_byte else TokenKind.TEXT
    for token_id, added in tokenizer.get_added_tokens_decoder().items():
        if added.special:
            kinds[token_id] = TokenKind.SILENT
    return tuple(kinds)


def _model_eos_token_ids(folder: Path) -> frozenset[int]:
    """End-of-sequence ids that the model's generation config names, or else its config, as transformers reads them."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{path}: damaged ({_line(error)})") from error
        ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if not all(type(token_id) is int for token_id in ids):
            raise CheckpointError(f"{path}: eos_token_id is {eos!r}, expected a token id or a list of them")
        if ids or name == "generation_config.json":
            return frozenset(ids)
    return frozenset()


def _why_not_loaded(folder: Path, error: Exception) -> str:
    """One line that names the file at fault, as far as it can be told."""
    import tokenizers

    path = folder / "tokenizer.json"
    try:
        tokenizers.Tokenizer.from_file(str(path))
    except Exception as cause:
        return f"{path}: damaged or incomplete ({_line(cause)})"
    for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json"):
        try:
            json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except ValueError as cause:
            return f"{folder / name}: damaged ({_line(cause)})"
    return f"{folder}: the tokenizer does not load ({_line(error)})"


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"


def _require_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"the text is not valid Unicode: a lone surrogate at character {error.start}"
        ) from None

"""A checkpoint's tokenizer: text to token ids and back, and chats to text."""

from __future__ import annotations

import functools
import logging
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.conversation.messages import ChatMessage, Tool
from cluster.conversation.tool_format import ToolFormat
from cluster.text.chat_template import ChatTemplate
from cluster.text.detokenizer import REPLACEMENT, TextDecoder, TokenKind
from cluster.text.gguf.folder import gguf_tokenizer_folder
from cluster.text.length_bound import LengthBound, length_bound
from cluster.text.token_bytes import TokenBytes
from cluster.text.tokenizer_files import load_tokenizers, one_line
from workers.errors import InvalidRequestError
from workers.loading.gguf.header import is_gguf

if TYPE_CHECKING:
    import tokenizers

logger = logging.getLogger(__name__)

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_TEMPLATE_ARGUMENTS = frozenset(
    {
        *("messages", "conversation", "conversations", "tools", "documents", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs"),
    }
)
"""What the template is given by this side, and no client may give it."""


_HELLO = "Hello"
_PROBES = (
    (ChatMessage("user", _HELLO),),
    (ChatMessage("system", "Be brief."), ChatMessage("user", _HELLO)),
)
"""Chats of which a template must be able to make a prompt: some want a system message, some refuse one."""
_ANCHORS_TRIED = 1000


class Tokenizer:
    """Text to token ids and back. Nothing in it changes after loading, so threads may share one.

    Attributes:
        eos_token_ids: the token that the tokenizer calls the end of a text; `ModelConfig.eos_token_ids` has it beside
            what the other files name.
        vocab_size: one more than the highest token id.
        special_token_ids: tokens that no text shows, by how they are spelled.
        length_bound: how much text a number of tokens can stand for, if this tokenizer allows to say so.
        anchor: a token with a text of its own, after which others are decoded as they continue a text; may be none.
        token_bytes: the bytes that a token stands for, by its id.
        whole_text: see `TextDecoder.whole_text`.
    """

    def __init__(self, hf_tokenizer: Any, *, own: tokenizers.Tokenizer | None = None) -> None:
        """Wrap a fast tokenizer of transformers, which must not be used elsewhere from then on.

        Args:
            hf_tokenizer: for the chat template and the names of special tokens.
            own: what turns text into tokens and back; None: that of `hf_tokenizer`.
        """
        self._hf = hf_tokenizer
        # Requests go to the Rust tokenizer directly: transformers' own call sets truncation and padding on it
        # each time, which fails ("Already borrowed") while another thread encodes.
        self._rust: tokenizers.Tokenizer = hf_tokenizer.backend_tokenizer if own is None else own
        self._rust.no_truncation()
        self._rust.no_padding()
        self._rust.encode_special_tokens = bool(getattr(hf_tokenizer, "split_special_tokens", False))
        eos = None if hf_tokenizer.eos_token is None else self._rust.token_to_id(str(hf_tokenizer.eos_token))
        self.eos_token_ids = frozenset[int]() if eos is None else frozenset({eos})
        self._kinds, self._bytes = _token_kinds(self._rust)
        self._chat_template = ChatTemplate(hf_tokenizer)
        self.vocab_size: int = len(self._kinds)
        self.special_token_ids: dict[str, int] = {
            added.content: token_id
            for token_id, added in self._rust.get_added_tokens_decoder().items()
            if added.special
        }
        self.length_bound: LengthBound | None = length_bound(self._rust)
        self.anchor: tuple[int, ...] = self._find_anchor()
        self._anchor_text = self.text_of(self.anchor)
        self.token_bytes = TokenBytes(self._rust)
        self.whole_text = functools.lru_cache(maxsize=65_536)(self.token_bytes.whole_text)
        self._no_chat = self._why_no_chat()

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Load the tokenizer of a checkpoint from its local folder or GGUF file; no code from the checkpoint is run.

        Raises:
            CheckpointError: `tokenizer.json`, or a file beside it that is needed, is missing or damaged.
        """
        if is_gguf(folder):
            with gguf_tokenizer_folder(folder) as written:
                return cls.load(written)
        hf_tokenizer, own = load_tokenizers(folder)
        return cls(hf_tokenizer, own=own)

    @property
    def vocab(self) -> dict[str, int]:
        """The id of every token as the checkpoint spells it, the added ones included."""
        return self._rust.get_vocab(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        """Whether there is a chat template, and it makes a prompt of a chat of one message."""
        return self._no_chat is None

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
        """Text of token ids: special tokens and unknown ids are left out, nothing else is cleaned up.

        One token alone is a piece of a text and no text of its own: see `token_text`.
        """
        return self.token_text(token_ids[0]) if len(token_ids) == 1 else self.text_of(token_ids)

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The text that begins with these tokens and has no others, as the library's own `decode` gives it."""
        return self._rust.decode(list(token_ids), skip_special_tokens=True)

    def token_text(self, token_id: int) -> str:
        """What a token adds to a text that it continues, a first space included; a special token adds nothing.

        A token that is a part of a character is U+FFFD.
        """
        token_id = int(token_id)
        kind = self.token_kind(token_id)
        if kind is TokenKind.SILENT:
            return ""
        if kind is TokenKind.BYTE:
            return bytes((self.byte_value(token_id),)).decode(errors="replace")
        return self.text_of((*self.anchor, token_id))[len(self._anchor_text) :]

    def token_kind(self, token_id: int) -> TokenKind:
        """What a token does to the text."""
        return self._kinds[token_id] if 0 <= token_id < len(self._kinds) else TokenKind.SILENT

    def byte_value(self, token_id: int) -> int:
        """The byte that a token of kind BYTE stands for."""
        return self._bytes[token_id]

    @property
    def chat_template(self) -> ChatTemplate:
        """The checkpoint's chat template."""
        return self._chat_template

    def token_name(self, token_id: int) -> str:
        """A token as the checkpoint spells it; empty for an id without a token."""
        return self._rust.id_to_token(token_id) or ""

    @property
    def with_special_tokens(self) -> TextDecoder:
        """The same vocabulary, whose special tokens have a text: the one that the checkpoint spells them with."""
        return _WithSpecialTokens(self, self._rust)

    def apply_chat_template(
        self,
        messages: Sequence[ChatMessage],
        variables: Mapping[str, Any] | None = None,
        *,
        tools: Sequence[Tool] = (),
        tool_format: ToolFormat | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt for a chat, by the checkpoint's template, up to where the model's answer begins.

        Encode it with `add_special_tokens=False`: the template writes the special tokens, the first one included.

        Args:
            messages: oldest first.
            variables: more that the template may look at, such as `enable_thinking`.
            tools: that the model may call.
            tool_format: that it speaks.
            add_generation_prompt: end with what begins an answer.
            continue_final_message: end in the last message, which the model goes on with; not with the one before.

        Raises:
            InvalidRequestError: there is no template or no message, the template refuses the messages, or a variable
                has a name that is not a client's to give.
        """
        if self._no_chat is not None:
            raise InvalidRequestError(f"{self._no_chat}; send a prompt instead of messages")
        if not messages:
            raise InvalidRequestError("the list of chat messages is empty")
        if taken := sorted(_TEMPLATE_ARGUMENTS & set(variables or {})):
            raise InvalidRequestError(f"chat_template_kwargs has {taken[0]}, which is not a variable of the template")
        if add_generation_prompt and continue_final_message:
            raise InvalidRequestError("continue_final_message and add_generation_prompt exclude each other")
        try:
            return self._chat_template.render(
                messages,
                variables or {},
                tools=tools,
                tool_format=tool_format,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        except Exception as error:  # a template is a program: it raises what it likes
            raise InvalidRequestError(f"the model's chat template refuses these messages: {one_line(error)}") from error

    def _why_no_chat(self) -> str | None:
        """Why no chat can become a prompt; None: one can."""
        if not self._hf.chat_template:
            return "this model has no chat template"
        reasons = []
        for probe in _PROBES:
            try:
                rendered = self._chat_template.render(
                    probe, {}, tools=(), tool_format=None, add_generation_prompt=True, continue_final_message=False
                )
                if _HELLO in rendered:
                    return None
                reasons.append("it leaves out what the user says")
            except Exception as error:  # a template is a program: it raises what it likes
                reasons.append(one_line(error))
        logger.warning("the checkpoint's chat template does not work, chats are refused: %s", reasons[0])
        return f"this model's chat template does not work ({reasons[0]})"

    def _find_anchor(self) -> tuple[int, ...]:
        """A token whose text is the same wherever it stands and whatever follows."""
        vocab = self.vocab
        letters = [vocab[letter] for letter in string.ascii_letters if letter in vocab]
        for token_id in (*letters, *sorted(vocab.values())[:_ANCHORS_TRIED]):
            if self._kinds[token_id] is TokenKind.TEXT:
                text = self.text_of((token_id,))
                if text and REPLACEMENT not in text and self.text_of((token_id, token_id)).startswith(text):
                    return (token_id,)
        return ()


class _WithSpecialTokens:
    """A tokenizer as a decoder that shows special tokens, too."""

    def __init__(self, tokenizer: Tokenizer, rust: tokenizers.Tokenizer) -> None:
        self._rust = rust
        self._kind = tokenizer.token_kind
        self.anchor = tokenizer.anchor
        self.byte_value = tokenizer.byte_value
        self.whole_text = tokenizer.whole_text

    def text_of(self, token_ids: Sequence[int]) -> str:
        return self._rust.decode(list(token_ids), skip_special_tokens=False)

    def token_kind(self, token_id: int) -> TokenKind:
        kind = self._kind(token_id)
        special = kind is TokenKind.SILENT and self._rust.id_to_token(token_id) is not None
        return TokenKind.TEXT if special else kind


def _token_kinds(tokenizer: tokenizers.Tokenizer) -> tuple[tuple[TokenKind, ...], dict[int, int]]:
    """The kind of every id up to the highest one, and the bytes that those of kind BYTE stand for."""
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    decoder = tokenizer.decoder
    byte_fallback = decoder is not None and b'"ByteFallback"' in decoder.__getstate__()
    kinds = [TokenKind.SILENT] * (max(vocab.values(), default=-1) + 1)
    values: dict[int, int] = {}
    for token, token_id in vocab.items():
        is_byte = byte_fallback and _BYTE_TOKEN.fullmatch(token)
        kinds[token_id] = TokenKind.BYTE if is_byte else TokenKind.TEXT
        if is_byte:
            values[token_id] = int(token[3:5], 16)
    for token_id, added in tokenizer.get_added_tokens_decoder().items():
        if added.special:
            kinds[token_id] = TokenKind.SILENT
    return tuple(kinds), values


def _require_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"the text is not valid Unicode: a lone surrogate at character {error.start}"
        ) from None

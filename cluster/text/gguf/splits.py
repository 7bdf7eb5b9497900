"""How byte-level tokenizers split a text into words before they merge, by llama.cpp's names for the ways.

The expressions are those of the models' own tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers


@dataclass(frozen=True)
class Split:
    """A way.

    Attributes:
        expression: of a word; None: GPT-2's.
        single_digits: whether every digit is a word, before anything else.
        whole_words: whether a word that is a token is that token, whatever merges say.
        adds_bos: whether a text begins with the beginning-of-sequence token where nothing is said.
        composes: whether the text is brought into NFC first.
    """

    expression: str | None = None
    single_digits: bool = False
    whole_words: bool = False
    adds_bos: bool = False
    composes: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """What splits, and spells bytes as characters."""
        steps: list[pre_tokenizers.PreTokenizer] = []
        if self.single_digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        if self.expression is not None:
            steps.append(pre_tokenizers.Split(Regex(self.expression), behavior="isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.expression is None))
        return pre_tokenizers.Sequence(steps)


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3 = Split("|".join([_CONTRACTIONS, _WORD, r"\p{N}{1,3}", _SIGNS, _SPACES]), whole_words=True, adds_bos=True)
_QWEN2 = Split("|".join([_CONTRACTIONS, _WORD, r"\p{N}", _SIGNS, _SPACES]), composes=True)
_TEKKEN = Split(
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
    whole_words=True,
    adds_bos=True,
)
_GPT2 = Split()
_DIGITS = Split(single_digits=True)

SPLITS: Mapping[str, Split] = {
    "gpt-2": _GPT2,
    "gpt2": _GPT2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "tekken": _TEKKEN,
}
"""By `tokenizer.ggml.pre`."""

"""A checkpoint's tokenizer from its files.

`tokenizer.json` says how text becomes tokens and tokens become text. transformers 5 takes vocabulary and merges from it
alone, where its class for the model has a constructor of its own, and makes the other steps (normaliser, pre-tokeniser,
decoder) anew as the class has them; so the file is read here as it is, with the tokens that the files beside it add.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.errors import CheckpointError
from workers.loading.config_reader import read_json

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedConfig

_ADDED_AT = ("add_bos_token", "add_eos_token")


def load_tokenizers(folder: Path) -> tuple[Any, tokenizers.Tokenizer]:
    """The tokenizer as transformers loads it, for chat template and names, and the one of `tokenizer.json` itself.

    No code from the checkpoint is run. This takes seconds: transformers is imported.

    Raises:
        CheckpointError: `tokenizer.json`, or a file beside it that is needed, is missing or damaged.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; a checkpoint needs its fast tokenizer")
    from transformers import AutoTokenizer, TokenizersBackend

    given = {"trust_remote_code": False, "local_files_only": True}
    try:
        hf_tokenizer = AutoTokenizer.from_pretrained(str(folder), config=_plain_config(folder), **given)
        by_file = hf_tokenizer
        if type(hf_tokenizer) is not TokenizersBackend:
            by_file = TokenizersBackend.from_pretrained(str(folder), **given)
        own: tokenizers.Tokenizer = by_file.backend_tokenizer
        _restore_ends(own, by_file, folder)
    except Exception as error:  # the library raises whatever its parsers raise
        raise CheckpointError(_why_not_loaded(folder, error)) from error
    if not hf_tokenizer.is_fast:
        raise CheckpointError(f"{path}: loads as {type(hf_tokenizer).__name__}, which is not a fast tokenizer")
    return hf_tokenizer, own


def _plain_config(folder: Path) -> PreTrainedConfig | None:
    """What of the model's configuration the choice of a tokenizer's class hangs on; None: on the configuration's class.

    Where tokenizer_config.json names the class, transformers asks for the model's type alone, to put names right that
    are known to be wrong. Its configuration of that type imports half of transformers and of PyTorch's compiler.
    """
    paths = [folder / name for name in ("tokenizer_config.json", "config.json")]
    if not all(path.is_file() for path in paths):
        return None
    stated, model = map(read_json, paths)
    if not isinstance(stated.get("tokenizer_class"), str) or not isinstance(model.get("model_type"), str):
        return None
    from transformers import PreTrainedConfig

    config = PreTrainedConfig(name_or_path=str(folder))
    config.model_type = model["model_type"]
    if "model_name" in model:
        config.model_name = model["model_name"]
    return config


def _restore_ends(own: tokenizers.Tokenizer, by_file: Any, folder: Path) -> None:
    """Have texts begin and end with the tokens that `tokenizer.json` adds, but for what tokenizer_config.json decides.

    transformers makes all of it anew as soon as one of the two settings is there, and takes the other for false.
    """
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    stated = {key: config[key] for key in _ADDED_AT if isinstance(config.get(key), bool)}
    if not stated:
        return
    rebuilt = own.post_processor
    own.post_processor = _post_processor_in(folder / "tokenizer.json")
    ids = own.encode("").ids
    has = {"add_bos_token": by_file.bos_token_id in ids[:1], "add_eos_token": by_file.eos_token_id in ids[-1:]}
    if any(has[key] != wanted for key, wanted in stated.items()):
        by_file.add_bos_token = stated.get("add_bos_token", has["add_bos_token"])
        by_file.add_eos_token = stated.get("add_eos_token", has["add_eos_token"])
    elif own.post_processor is None:
        own.post_processor = rebuilt


def _post_processor_in(path: Path) -> Any:
    """The step of a tokenizer.json that adds tokens to a text's beginning and end; None: there is none."""
    import tokenizers

    content = json.loads(path.read_text(encoding="utf-8"))
    content |= {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}
    return tokenizers.Tokenizer.from_str(json.dumps(content)).post_processor


def _why_not_loaded(folder: Path, error: Exception) -> str:
    """One line that names the file at fault, as far as it can be told."""
    import tokenizers

    path = folder / "tokenizer.json"
    try:
        tokenizers.Tokenizer.from_file(str(path))
    except Exception as cause:
        return f"{path}: damaged or incomplete ({one_line(cause)})"
    for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json"):
        try:
            json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except ValueError as cause:
            return f"{folder / name}: damaged ({one_line(cause)})"
    return f"{folder}: the tokenizer does not load ({one_line(error)})"


def one_line(error: Exception) -> str:
    """What an error says, on one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"

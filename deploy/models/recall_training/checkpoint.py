"""Saving and loading a model with its tokenizer, in Hugging Face format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
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


def load(path: Path, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a checkpoint as any user of it would."""
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(path)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path).to(device).eval()
    return model, tokenizer

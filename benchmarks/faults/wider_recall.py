"""The recall model with heads to share: the same function, whose right answers are as well known.

It has three KV heads, which no two ranks can share. A fourth, with its two query heads, whose weights are zeros adds
nothing to any sum.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from cluster.recall import SHIPPED_MODEL

_ADDED = {"q_proj": 2, "k_proj": 1, "v_proj": 1, "o_proj": 2}
"""Heads, by the weights that have them: rows of the first three, columns of the last."""


def make_wider_recall(folder: Path) -> Path:
    """Write the checkpoint into a folder, and return that."""
    shutil.copytree(SHIPPED_MODEL, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config["num_attention_heads"] += 2
    config["num_key_value_heads"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        added = next((count for part, count in _ADDED.items() if f".{part}." in name), 0) * config["head_dim"]
        if added and "o_proj" in name:
            weights[name] = torch.cat([weight, weight.new_zeros(weight.shape[0], added)], dim=1)
        elif added:
            weights[name] = torch.cat([weight, weight.new_zeros(added, weight.shape[1])])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder

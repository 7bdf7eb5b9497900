"""What is no GGUF file that can be served is refused when it is looked at, and nothing of it is read past its end."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf_files import write_gguf
from workers.errors import CheckpointError
from workers.loading.checkpoint import resolve_checkpoint, stored_tensors
from workers.loading.gguf.header import read_header
from workers.models.registry import read_model


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def written(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(checkpoint, tmp_path_factory.mktemp("gguf") / "model.gguf")


def look(file: Path) -> None:
    """What a service does with a model before it starts anything."""
    folder = resolve_checkpoint(str(file))
    read_model(folder)
    stored_tensors(folder)


def test_a_whole_file_is_not_refused(written: Path) -> None:
    look(written)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"split.count": 3, "split.no": 0}, "one of 3 files that a model was split into"),
        ({"llama.expert_count": 8}, "llama.expert_count: 8 is not supported"),
        ({"llama.rope.scaling.type": "longrope"}, "llama.rope.scaling.type: 'longrope' is not supported"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count: 8 is not supported beside heads of 16"),
        ({"llama.embedding_length": None}, "llama.embedding_length: is missing"),
        ({"llama.block_count": "many"}, "llama.block_count: must be an integer"),
        ({"tokenizer.ggml.eos_token_id": 512}, "eos_token_id: 512 is none of the vocabulary's 512 tokens"),
        ({"general.alignment": 7}, "general.alignment: must be a multiple of 8"),
    ],
)
def test_metadata_that_cannot_be_served(
    checkpoint: Path, tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    if "general.alignment" in metadata:  # the writer would not write it
        file = tmp_path / "model.gguf"
        raw = write_gguf(checkpoint, file, metadata={"general.alignment": 64}).read_bytes()
        key = raw.index(b"general.alignment") + len(b"general.alignment") + 4
        file.write_bytes(raw[:key] + (7).to_bytes(4, "little") + raw[key + 4 :])
    else:
        file = write_gguf(checkpoint, tmp_path / "model.gguf", metadata=metadata)
    with pytest.raises(CheckpointError, match=message) as raised:
        look(file)
    assert str(file) in str(raised.value)


def test_tensors_that_have_no_place(checkpoint: Path, tmp_path: Path) -> None:
    file = write_gguf(checkpoint, tmp_path / "a.gguf", tensors={"blk.0.ssm_a": np.zeros(4, np.float32)})
    with pytest.raises(CheckpointError, match=r"tensor blk\.0\.ssm_a is none that a model of this architecture has"):
        look(file)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"GGUF\x03\0\0\0", b"GGML\x03\0\0\0", "does not begin with GGUF"),
        (b"GGUF\x03\0\0\0", b"GGUF\x09\0\0\0", "of version 9"),
        (b"GGUF\x03\0\0\0", b"GGUF\0\0\0\x03", "of a big-endian machine"),
        (b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0bloom", "general.architecture: 'bloom' is not supported"),
        (b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0ll\xffma", "not UTF-8"),
        (b"\x05\0\0\0\0\0\0\0llama", b"\xff\xff\xff\xff\xff\xff\xff\x7fllama", "ends within its header"),
        (b"output_norm.weight\x01\0\0\0", b"output_norm.weight\x09\0\0\0", "has 9 dimensions"),
        (b"llama.block_count\x04", b"llama.block_count\x40", "is of kind 64"),
    ],
)
def test_damage(written: Path, tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    raw, file = written.read_bytes(), tmp_path / "model.gguf"
    assert raw.count(old) >= 1
    file.write_bytes(raw.replace(old, new, 1))
    with pytest.raises(CheckpointError, match=message):
        look(file)


def test_a_file_that_ends_early(written: Path, tmp_path: Path) -> None:
    """Anywhere: within the magic, the metadata, the tensors' descriptions and the tensors."""
    raw, file, rng = written.read_bytes(), tmp_path / "model.gguf", random.Random(0)
    begin = min(tensor.offset for tensor in read_header(written).tensors.values())
    for length in (0, 3, 7, 20, *(rng.randrange(24, begin) for _ in range(20)), begin, len(raw) - 40):
        file.write_bytes(raw[:length])
        with pytest.raises(CheckpointError, match=r"truncated|no GGUF file"):
            look(file)


def test_a_file_with_any_byte_of_its_header_changed_is_read_or_refused(written: Path, tmp_path: Path) -> None:
    raw, file, rng = bytearray(written.read_bytes()), tmp_path / "model.gguf", random.Random(1)
    begin = min(tensor.offset for tensor in read_header(written).tensors.values())
    refused = 0
    for _ in range(60):
        place, value = rng.randrange(begin), rng.randrange(256)
        file.write_bytes(raw[:place] + bytes([value]) + raw[place + 1 :])
        try:
            look(file)
        except CheckpointError:
            refused += 1
    assert refused > 5


def test_names_of_what_is_there_instead(written: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.gguf does not exist"):
        resolve_checkpoint(str(tmp_path / "absent.gguf"))
    shutil.copy(written, tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=r"folder with GGUF files; name the one .*model\.gguf"):
        stored_tensors(tmp_path)
    pointer = tmp_path / "pointer.gguf"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        look(pointer)
    nameless = tmp_path / "blob"
    shutil.copy(written, nameless)
    assert resolve_checkpoint(str(nameless)) == nameless

"""Tiny random checkpoints in Hugging Face format, for every test that needs a model, and options of the test run."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fuzzing  # noqa: F401  # has the profile that `--hypothesis-profile` may name
from whole_parsing import parse_whole

parse_whole()

if not torch.cuda.is_available():  # read when a kernel is defined: before anything imports one
    os.environ.setdefault("TRITON_INTERPRET", "1")

os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 starves its workers beside tests that compute
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:  # of a shell's background job; programs under test would inherit it
        signal.signal(_number, _handler)

TinyCheckpoint = Callable[..., Path]

_NICE = 5
_CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_TOKENIZER_TEXT = [
    "the quick brown fox jumps over the lazy dog and the cat sat on the mat",
    "a block table names the blocks of a sequence in order; a slot is one token of one block",
    "numbers 0 1 2 3 4 5 6 7 8 9 10 42 100 1234 and names ada bob eve",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--conformance-summary", metavar="FILE", help="write what the conformance suite found as JSON")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--conformance-summary")
    if path and not hasattr(config, "workerinput"):  # pytest-xdist's workers report to this process
        from conformance_summary import ConformanceSummary

        config.pluginmanager.register(ConformanceSummary(Path(path)), "conformance-summary")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In pytest-xdist's processes what takes longest comes first, see `side_by_side`."""
    if hasattr(config, "workerinput"):
        from side_by_side import start_early

        items.sort(key=lambda item: start_early(item.path))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """In pytest-xdist's processes all that do not run Ray let it go before: its workers have to start in time."""
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") == "1":
        from interpreted_kernels import hasten

        hasten()
    if hasattr(item.config, "workerinput") and item.get_closest_marker("ray") is None and os.nice(0) < _NICE:
        os.nice(_NICE)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """See `side_by_side`; for `--dist loadfile`."""
    if config.getvalue("dist") != "loadfile":
        return None
    from side_by_side import RayTogether

    return RayTogether(config, log)


def _save_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level BPE of at most `vocab_size` tokens: <pad> 0, <s> 1, </s> 2, then bytes, then merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, 320),
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TOKENIZER_TEXT, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = _CHAT_TEMPLATE
    wrapped.save_pretrained(folder)


def _build(folder: Path, family: str, seed: int, max_shard_size: str, overrides: dict[str, Any]) -> None:
    import transformers

    from tiny_families import COMMON, FAMILIES

    row = FAMILIES[family]
    config = getattr(transformers, f"{row.config or row.prefix}Config")(**{**COMMON, **row.settings, **overrides})
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{row.prefix}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # ones and zeros would hide a weight that is never applied
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith(("bias", "sinks")):
                parameter.normal_(0.0, 0.3, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("bias"):
                buffer.normal_(0.0, 0.3, generator=generator)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    _save_tokenizer(folder, config.vocab_size)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """`tiny_checkpoint(family, seed=0, max_shard_size="1GB", **config_overrides) -> Path`, built once per arguments.

    Families are those of `tiny_families`. The folder holds config.json, safetensors, generation_config.json and a
    byte-level tokenizer with a chat template. It is shared: copy it before changing it.
    """
    built: dict[str, Path] = {}

    def make(family: str, *, seed: int = 0, max_shard_size: str = "1GB", **overrides: Any) -> Path:
        key = json.dumps([family, seed, max_shard_size, overrides], sort_keys=True)
        if key not in built:
            folder = tmp_path_factory.mktemp(family)
            _build(folder, family, seed, max_shard_size, overrides)
            built[key] = folder
        return built[key]

    return make


@pytest.fixture(scope="session")
def reference_greedy() -> Callable[..., list[int]]:
    """`reference_greedy(checkpoint, prompt, num_tokens)`: what transformers generates, end-of-sequence ignored."""
    import transformers

    models: dict[Path, torch.nn.Module] = {}
    answers: dict[tuple[Path, tuple[int, ...]], list[int]] = {}

    def generate(checkpoint: Path, prompt: list[int], num_tokens: int) -> list[int]:
        if checkpoint not in models:
            models[checkpoint] = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        key = (checkpoint, tuple(prompt))
        if len(answers.get(key, [])) < num_tokens:
            with torch.inference_mode():
                output = models[checkpoint].generate(
                    torch.tensor([list(prompt)]),
                    attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                    max_new_tokens=num_tokens,
                    min_new_tokens=num_tokens,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )
            answers[key] = output[0, len(prompt) :].tolist()
        return answers[key][:num_tokens]

    return generate

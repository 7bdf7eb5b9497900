"""What compiles grammars and makes masks: llguidance, which Baton uses, beside xgrammar, if that is installed.

python -m benchmarks.grammar_libraries --tokenizer FOLDER --output FILE

Made JSON schemas are compiled, and each is answered by tokens that are drawn from the masks alone; the answers are
checked by `jsonschema`. Then come forms that take long to compile, each in a process of its own, which is ended when
it takes longer than a limit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jsonschema  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from benchmarks.environment import RESULTS, Environment
from benchmarks.made_schemas import made_schema
from benchmarks.report import to_json, write_json
from workers.errors import InvalidRequestError
from workers.grammars.compiler import GrammarCompiler
from workers.grammars.matcher import TokenMatcher
from workers.structured_output import GrammarKind, StructuredOutput

_LIMIT_S = 20.0
_MOST_TOKENS = 400
HARD: dict[str, StructuredOutput] = {
    "2000 optional properties": StructuredOutput.json_schema(
        {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(2000)}}
    ),
    "enum of 10000 texts": StructuredOutput.json_schema({"enum": [f"value number {i}" for i in range(10_000)]}),
    "text of 1000000 characters": StructuredOutput.json_schema({"type": "string", "maxLength": 1_000_000}),
    "nested repetition": StructuredOutput.regex("((a{1,100}){1,100}){1,100}"),
    "repeated alternatives": StructuredOutput.regex("(abc|def|[a-z]{3,1000}){1,1000}"),
    "multiple of 1000003": StructuredOutput.json_schema({"type": "integer", "multipleOf": 1_000_003}),
    "uniqueItems": StructuredOutput.json_schema({"type": "array", "uniqueItems": True}),
}


class Library(Protocol):
    """One of the two, for one vocabulary."""

    def compile(self, wanted: StructuredOutput) -> Any:
        """Where its texts begin."""
        ...

    def fill(self, state: Any, bits: npt.NDArray[np.int32]) -> None:
        """Write which tokens may come."""
        ...

    def take(self, state: Any, token_id: int) -> None:
        """Go on with a token."""
        ...


class LlGuidance:
    """Through Baton's own classes."""

    def __init__(self, folder: Path, vocab_size: int, eos_token_id: int) -> None:
        self._compiler = GrammarCompiler.of_checkpoint(folder, vocab_size, (eos_token_id,))
        self._compiler.compile(StructuredOutput.choice(["a"]))

    def compile(self, wanted: StructuredOutput) -> TokenMatcher:
        """See `Library`."""
        return self._compiler.compile(wanted).matcher()

    def fill(self, state: TokenMatcher, bits: npt.NDArray[np.int32]) -> None:
        """See `Library`."""
        state.matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)

    def take(self, state: TokenMatcher, token_id: int) -> None:
        """See `Library`."""
        state.matcher.consume_token(token_id)


class XGrammar:
    """With one thread and without its cache, as the other."""

    def __init__(self, folder: Path, vocab_size: int, eos_token_id: int) -> None:
        import xgrammar
        from transformers import AutoTokenizer

        info = xgrammar.TokenizerInfo.from_huggingface(AutoTokenizer.from_pretrained(folder), vocab_size=vocab_size)
        self._matcher = xgrammar.GrammarMatcher
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(self, wanted: StructuredOutput) -> Any:
        """See `Library`."""
        if wanted.kind is GrammarKind.JSON_SCHEMA:
            any_whitespace = not wanted.disable_any_whitespace
            return self._matcher(self._compiler.compile_json_schema(wanted.text, any_whitespace=any_whitespace))
        return self._matcher(self._compiler.compile_regex(wanted.text))

    def fill(self, state: Any, bits: npt.NDArray[np.int32]) -> None:
        """See `Library`."""
        import torch

        state.fill_next_token_bitmask(torch.from_numpy(bits).unsqueeze(0), 0)

    def take(self, state: Any, token_id: int) -> None:
        """See `Library`."""
        state.accept_token(token_id)


LIBRARIES: dict[str, Callable[[Path, int, int], Library]] = {"llguidance": LlGuidance, "xgrammar": XGrammar}


def measure(make: Callable[[], Library], tokenizer: Tokenizer, eos_token_id: int, num_schemas: int) -> dict[str, Any]:
    """Compile made schemas and answer each; times are in seconds of a core, which others who use it do not change."""
    library, rng = make(), random.Random(0)
    vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
    bits = np.zeros(-(-vocab_size // 32), dtype=np.int32)
    compile_s, mask_s, valid = [], [], 0
    for seed in range(num_schemas):
        schema, began = made_schema(seed), time.thread_time()
        state = library.compile(StructuredOutput.json_schema(schema, disable_any_whitespace=True))
        compile_s.append(time.thread_time() - began)
        output: list[int] = []
        while len(output) < _MOST_TOKENS:
            began = time.thread_time()
            library.fill(state, bits)
            mask_s.append(time.thread_time() - began)
            allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")[:vocab_size])
            token_id = int(rng.choice(allowed))
            if token_id == eos_token_id:
                break
            library.take(state, token_id)
            output.append(token_id)
        valid += _is_valid(tokenizer.decode(output, skip_special_tokens=False), schema)
    return {"compile_s": _spread(compile_s), "mask_s": _spread(mask_s), "valid": valid, "schemas": num_schemas}


def _is_valid(text: str, schema: dict[str, Any]) -> bool:
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def _spread(times: Sequence[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {
        "mean": statistics.fmean(ordered),
        "median": statistics.median(ordered),
        "p99": ordered[int(0.99 * len(ordered))],
        "max": ordered[-1],
    }


def hard_case(make: Callable[[], Library], wanted: StructuredOutput, limit_s: float) -> str:
    """What becomes of a form that takes long, in words."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def work() -> None:
        library, began = make(), time.perf_counter()
        try:
            library.compile(wanted)
            outcome = ""
        except (InvalidRequestError, RuntimeError, ValueError) as error:
            outcome = f", refused: {str(error).splitlines()[0]:.60}"
        send.send(f"{1e3 * (time.perf_counter() - began):.0f} ms{outcome}")

    process = context.Process(target=work)
    process.start()
    try:
        return str(receive.recv()) if receive.poll(limit_s) else f"not within {limit_s:g} s"
    finally:
        process.kill()
        process.join()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is installed, and write it down."""
    parser = argparse.ArgumentParser("grammar_libraries", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--library", action="append", choices=tuple(LIBRARIES), help="may be repeated; default: both")
    parser.add_argument("--schemas", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS / "grammar_libraries.json", help="default: %(default)s")
    args = parser.parse_args(argv)
    environment = Environment.capture(1)
    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    eos = json.loads((args.tokenizer / "tokenizer_config.json").read_text())["eos_token"]
    eos_token_id = tokenizer.token_to_id(eos if isinstance(eos, str) else eos["content"])
    if eos_token_id is None:
        parser.error(f"{args.tokenizer}: tokenizer_config.json names an eos_token that is no token")
    vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
    measured = {}
    for name in args.library or LIBRARIES:

        def make(name: str = name) -> Library:
            return LIBRARIES[name](args.tokenizer, vocab_size, eos_token_id)

        hard = {case: hard_case(make, wanted, _LIMIT_S) for case, wanted in HARD.items()}
        measured[name] = {**measure(make, tokenizer, eos_token_id, args.schemas), "hard": hard}
    config = {"vocab_size": vocab_size, "schemas": args.schemas, "limit_s": _LIMIT_S}
    write_json(args.output, to_json("grammar_libraries", environment, config, {"libraries": measured}))


if __name__ == "__main__":
    main()

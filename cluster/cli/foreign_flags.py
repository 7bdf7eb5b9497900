"""Flags of other servers: what `baton up` calls the same, for who types them here."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

SETTINGS = {
    "--max-model-len": ("model.max_model_len",),
    "--context-length": ("model.max_model_len",),
    "--served-model-name": ("model.served_name",),
    "--dtype": ("model.dtype",),
    "--block-size": ("prefill.block_size", "decode.block_size"),
    "--page-size": ("prefill.block_size", "decode.block_size"),
    "--max-num-seqs": ("decode.max_num_seqs",),
    "--max-running-requests": ("decode.max_num_seqs",),
    "--max-num-batched-tokens": ("prefill.max_num_batched_tokens",),
    "--chunked-prefill-size": ("prefill.max_num_batched_tokens",),
    "--api-key": ("server.auth_token",),
    "--ssl-certfile": ("server.tls_cert",),
    "--ssl-keyfile": ("server.tls_key",),
    "--ssl-ca-certs": ("server.tls_client_ca",),
    "--num-gpu-blocks-override": ("prefill.num_blocks", "decode.num_blocks"),
    "--max-queued-requests": ("server.max_queue",),
}
"""By flag of vLLM or SGLang: the settings that take its value."""

FLAGS = {
    "--model-path": "--model",
    "-tp": "--tensor-parallel-size",
    "--tp": "--tensor-parallel-size",
    "--tp-size": "--tensor-parallel-size",
    "--mem-fraction-static": "--gpu-memory-utilization",
    "--disable-cuda-graph": "--enforce-eager",
}
"""By flag of vLLM or SGLang: what `baton up` calls it."""

_NO_PREFIX_CACHE = "say --set prefill.enable_prefix_caching=false --set decode.enable_prefix_caching=false"
SENTENCES = {
    "--enable-prefix-caching": "it is on unless --set prefill.enable_prefix_caching=false",
    "--no-enable-prefix-caching": _NO_PREFIX_CACHE,
    "--disable-radix-cache": _NO_PREFIX_CACHE,
    "--enable-chunked-prefill": "long prompts always go in chunks, of prefill.max_num_batched_tokens",
    "--data-parallel-size": "say --prefill N and --decode N: every pool has as many workers as you want",
    "-dp": "say --prefill N and --decode N: every pool has as many workers as you want",
    "--dp-size": "say --prefill N and --decode N: every pool has as many workers as you want",
    "--pipeline-parallel-size": "a worker is not split by layers, only by --tensor-parallel-size",
    "-pp": "a worker is not split by layers, only by --tensor-parallel-size",
    "--kv-transfer-config": "prefill and decode are always on workers of their own: say --prefill N and --decode N",
    "--disaggregation-mode": "prefill and decode are always on workers of their own: say --prefill N and --decode N",
    "--quantization": "weights are read as the checkpoint stores them",
    "--trust-remote-code": "no code from a checkpoint is ever run",
    "--tokenizer": "a checkpoint brings its own tokenizer",
    "--chat-template": "the checkpoint's own chat template is used",
    "--seed": "each request has its own seed",
}
"""By flag of vLLM or SGLang that nothing here takes the value of: why, or what does the same."""


class UpParser(argparse.ArgumentParser):
    """Answers a flag of another server with what it is called here, and a misspelt one with the nearest.

    `baton up` and its like are parsed by it.
    """

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As `argparse` does; whatever is not known is an error with a hint."""
        given = list(sys.argv[1:] if args is None else args)
        parsed, unknown = self.parse_known_args(given, namespace)
        if unknown:
            self._refuse(given, unknown)
        return parsed

    def _refuse(self, given: Sequence[str], unknown: Sequence[str]) -> NoReturn:
        lines = []
        for argument in unknown:
            if argument.startswith("-"):
                flag, equals, value = argument.partition("=")
                following = given[given.index(argument) + 1 :]
                if not equals and following and not following[0].startswith("-"):
                    value = following[0]
                lines.append(f"{flag}: {hint(flag, value) or self._nearest(flag)}")
        self.error("\n  ".join(["there is no", *lines]) if lines else f"unrecognized arguments: {' '.join(unknown)}")

    def _nearest(self, flag: str) -> str:
        known = [option for action in self._actions for option in action.option_strings]
        nearest = difflib.get_close_matches(flag, known, n=1)
        return f"did you mean {nearest[0]}?" if nearest else "--help lists what there is; --set takes any setting"


def hint(flag: str, value: str = "") -> str | None:
    """What a flag of another server is called here; None: it is not known.

    Args:
        flag: as it was typed, with its dashes.
        value: what was given for it; empty: nothing.
    """
    if settings := SETTINGS.get(flag):
        return "say " + " ".join(f"--set {setting}={value}" for setting in settings)
    if name := FLAGS.get(flag):
        return f"say {name} {value}".rstrip()
    return SENTENCES.get(flag)

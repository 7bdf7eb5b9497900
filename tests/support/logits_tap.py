"""Keeps copies of the logits that workers compute, bit for bit, by looking over the runners' shoulders."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from workers.runner.decode_runner import DecodeRunner
from workers.runner.model_runner import ModelRunner


class LogitsTap:
    """While it is installed: the logits of every request's tokens, in order, as the device had them.

    Prefill does not say whose logits it computes: they are kept in the order of its batches.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prefill: list[torch.Tensor] = []
        self.decode: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.batch_sizes: list[int] = []
        forward, launch = ModelRunner.forward, DecodeRunner.launch

        def keep_forward(runner, rows, *args, **kwargs):
            logits = forward(runner, rows, *args, **kwargs)
            self.prefill += list(logits.clone())
            return logits

        def keep_launch(runner, sequences):
            launched = launch(runner, sequences)
            self.batch_sizes.append(len(launched.sequences))
            for sequence, row in zip(launched.sequences, launched.logits.clone(), strict=True):
                self.decode[sequence.request.request_id].append(row)
            return launched

        monkeypatch.setattr(ModelRunner, "forward", keep_forward)
        monkeypatch.setattr(DecodeRunner, "launch", keep_launch)

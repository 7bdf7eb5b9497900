"""A batch as the model gets it, and the one copy that takes it to a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attention.errors import AttentionInputError
from workers.host_copies import to_device_together
from workers.runner.input_batch import Row, batch_inputs


@pytest.mark.parametrize("array", [list, tuple, lambda ids: np.asarray(ids, dtype=np.int64)])
def test_rows_are_packed_one_behind_the_other(array, device):
    rows = [
        Row(array([5, 6, 7]), 0, [[3]]),
        Row(array([8, 9]), 6, [(1, 0, 2)], wants_logits=False),
        Row(array([4]), 9, [range(2, 5)]),
    ]
    inputs = batch_inputs(rows, [4], torch.device(device))
    (common,) = inputs.metadata
    assert inputs.input_ids.tolist() == [5, 6, 7, 8, 9, 4]
    assert inputs.positions.tolist() == [0, 1, 2, 6, 7, 9]
    assert inputs.wanted is not None
    assert inputs.wanted.tolist() == [2, 5]
    assert common.cu_seqlens_q.tolist() == [0, 3, 5, 6]
    assert common.seq_lens.tolist() == [3, 8, 10]
    assert common.block_tables.tolist() == [[3, 0, 0], [1, 0, 0], [2, 3, 4]]
    assert common.slot_mapping.tolist() == [12, 13, 14, 2, 3, 17]
    assert (common.query_lens, common.context_lens) == ((3, 2, 1), (3, 8, 10))
    on_device = {t.device.type for t in (inputs.input_ids, inputs.wanted, common.block_tables, common.slot_mapping)}
    assert on_device == {device}
    assert inputs.input_ids.dtype == inputs.positions.dtype == inputs.wanted.dtype == torch.int64


def test_logits_after_every_token_need_no_choice():
    inputs = batch_inputs([Row([5], 3, [[0]]), Row([6], 0, [[1]])], [4], torch.device("cpu"))
    assert inputs.wanted is None


def test_nobody_may_want_logits():
    inputs = batch_inputs([Row([5, 6], 0, [[0]], wants_logits=False)], [4], torch.device("cpu"))
    assert inputs.wanted is not None
    assert inputs.wanted.tolist() == []


def test_too_few_blocks_are_refused():
    with pytest.raises(AttentionInputError, match="sequence 0: 5 of 5 tokens in 1 blocks of 4"):
        batch_inputs([Row([5] * 5, 0, [[0]])], [4], torch.device("cpu"))


def test_tensors_that_travel_together_arrive_as_they_were(device):
    tensors = [
        torch.arange(7),
        torch.arange(12, dtype=torch.int32).view(3, 4),
        torch.empty(0, dtype=torch.int64),
        torch.tensor([True, False]),
        torch.zeros((2, 0), dtype=torch.int32),
        torch.tensor([1.5]),
    ]
    arrived = to_device_together(tensors, torch.device(device))
    for sent, got in zip(tensors, arrived, strict=True):
        assert got.device.type == device
        assert (got.dtype, got.shape) == (sent.dtype, sent.shape)
        assert torch.equal(got.cpu(), sent)
    if device == "cuda":
        assert all(got.data_ptr() % 16 == 0 for got in arrived if got.numel())

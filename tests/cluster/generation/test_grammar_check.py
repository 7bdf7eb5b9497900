"""Grammars are checked in a process of their own: one that takes too long harms nobody, and the next is answered."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from cluster.generation.grammar_check import GrammarCheck
from workers.errors import InvalidRequestError
from workers.structured_output import StructuredOutput


@pytest.fixture
async def check(tiny_checkpoint):
    check = GrammarCheck(tiny_checkpoint("llama"), 512, (2,), limit_s=2.0)
    yield check
    await check.aclose()


async def test_grammars_are_checked_within_limits(check: GrammarCheck) -> None:
    await check.check(StructuredOutput.json_schema({"type": "integer"}))
    with pytest.raises(InvalidRequestError, match=r"structured_output.json_schema cannot be used: .*uniqueItems"):
        await check.check(StructuredOutput.json_schema({"uniqueItems": True}))
    endless = StructuredOutput.json_schema({"type": "integer", "multipleOf": 1_000_003})
    patient = StructuredOutput.regex("[a-z]+")
    refused, answered = await asyncio.gather(check.check(endless), check.check(patient), return_exceptions=True)
    assert str(refused) == "structured_output.json_schema takes longer to compile than the limit of 2 s"
    assert answered is None, "it waited, and had a process of its own"
    with pytest.raises(InvalidRequestError, match="limit of 2 s"):  # known: it is not tried again
        await asyncio.wait_for(check.check(endless), 1.0)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(check.check(StructuredOutput.json_schema({"multipleOf": 1_000_003})), 0.2)
    await check.check(StructuredOutput.regex("[0-9]+"))


async def test_a_model_without_a_tokenizer_takes_none(tmp_path) -> None:
    check = GrammarCheck(tmp_path, 512, (2,))
    with pytest.raises(InvalidRequestError, match=r"takes no structured_output: .*tokenizer.json"):
        await check.check(StructuredOutput.json_object())
    await check.aclose()


async def test_forms_are_remembered_and_not_kept(check: GrammarCheck) -> None:
    """A thousand of 256 KiB would be as much memory as nobody has for them."""
    form = StructuredOutput.choice(["a" * 1000])
    await check.check(form)
    kept = weakref.ref(form)
    del form
    gc.collect()
    assert kept() is None
    with pytest.raises(InvalidRequestError):
        await check.check(StructuredOutput.regex("("))
    await check.check(StructuredOutput.choice(["("]))

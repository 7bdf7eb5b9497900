"""Tests and benchmarks use what is public: a class may change its inside, or move, without them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("tests", "benchmarks")

FOREIGN = frozenset(
    {
        "os._exit",
        "config._experts_implementation",  # of transformers, which has no other way to its reference of experts
        "listener._listener",  # of multiprocessing, which has no other way to a time limit
        "listener._listener._socket",
        "torch._dynamo",
        "torch.fx._symbolic_trace",
        "torch.fx._symbolic_trace._is_fx_tracing_flag",
        "interpreter._patch_lang",
        "interpreter._get_np_dtype",  # of Triton, whose interpreter does the same work at every call of a function
        "ray.autoscaler._private.resource_demand_scheduler._default_utilization_scorer",
    }
)
"""What other libraries offer in no other way, as it is written."""

BY_NAME = frozenset({"getattr", "setattr", "delattr", "hasattr", "attrgetter", "patch", "object"})
"""Functions, the methods of `monkeypatch` and `mock` among them, that are given attributes as strings."""

PRIVATE = re.compile(r"(?:^|\.)_(?!_)\w+$")


def private_places(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every use of a private attribute of anything but `self` and `cls`, programs in strings included.

    Raises:
        SyntaxError: it is no Python.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(value, attr) if PRIVATE.match(attr):
                if not (isinstance(value, ast.Name) and value.id in ("self", "cls")):
                    yield node.lineno, ast.unparse(node)
            case ast.ImportFrom(module, names):
                yield from ((node.lineno, f"{module}.{name.name}") for name in names if PRIVATE.match(name.name))
            case ast.Call(ast.Name(called) | ast.Attribute(attr=called), args) if called in BY_NAME:
                texts = [part for argument in args for part in ast.walk(argument) if isinstance(part, ast.Constant)]
                yield from ((text.lineno, ast.unparse(node)) for text in texts if _names_private(text.value))
            case ast.Constant(str(text)) if "import " in text and "\n" in text:
                yield from ((node.lineno + line - 1, found) for line, found in _places_in_program(text))


def _names_private(value: object) -> bool:
    return isinstance(value, str) and PRIVATE.search(value) is not None


def _places_in_program(text: str) -> list[tuple[int, str]]:
    try:
        return list(private_places(text))
    except SyntaxError:
        return []


@pytest.mark.parametrize(
    "source",
    [
        "worker._blocks",
        "worker._blocks.find(hashes)",
        "worker.decoder._sizes = [64]",
        "self.worker._step()",
        "super()._step()",
        "from workers.builder import _measure",
        "setattr(worker, '_blocks', None)",
        "monkeypatch.setattr(replacement, '_DELAYS_S', (0.0,))",
        "monkeypatch.setattr('workers.builder._measure', measure)",
        "monkeypatch.setattr(f'{module}._PATIENCE_S', 1.0)",
        f"run({'import asyncio' + chr(10) + 'actor._on_end(None)'!r})",
    ],
)
def test_a_private_attribute_is_found(source: str) -> None:
    assert list(private_places(source))


@pytest.mark.parametrize(
    "source", ["self._blocks", "cls._made", "worker.__class__", "_helper()", "worker.blocks", "tensors['k_scale_']"]
)
def test_what_is_public_or_ones_own_is_not(source: str) -> None:
    assert not list(private_places(source))


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_private_is_used(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, text in private_places(path.read_text(encoding="utf-8"))
        if text not in FOREIGN
    ]
    assert not found, "private attributes; add a public view, or an argument:\n" + "\n".join(found)

"""Parsing while collections run code that parses."""

import ast
import gc

import whole_parsing


def test_a_collection_that_parses_disturbs_no_parse() -> None:
    whole_parsing.parse_whole()
    busy = False
    threshold = gc.get_threshold()

    def parse_as_well(phase: str, info: dict[str, int]) -> None:
        nonlocal busy
        if phase == "start" and not busy:
            busy = True
            ast.parse("a + b")
            busy = False

    source = "\n".join(f"x{i} = (lambda a: [a, (a + {i}) * 2, f(a)[1]])" for i in range(200))
    gc.callbacks.append(parse_as_well)
    gc.set_threshold(5)
    try:
        trees = [ast.parse(source) for _ in range(20)]
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(parse_as_well)
    assert gc.isenabled()
    assert all(len(tree.body) == 200 for tree in trees)

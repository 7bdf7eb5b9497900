"""How a format writes calls, as data: what a grammar is made of where a call must be made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CallSyntax:
    """The text of calls; `{name}` stands for the function's.

    Attributes:
        begin: up to the arguments.
        end: behind them.
        section_begin: before the first call.
        section_end: behind the last one.
        separator: between two calls.
        parallel: whether an answer can have several calls.
        xml_parameters: whether arguments are no JSON but one element a parameter, as Qwen3-Coder writes them.
    """

    begin: str
    end: str
    section_begin: str = ""
    section_end: str = ""
    separator: str = ""
    parallel: bool = True
    xml_parameters: bool = False

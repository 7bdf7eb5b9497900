"""The task as text: lists of names with numbers, and a question about one of them."""

from __future__ import annotations

import random
from dataclasses import dataclass

WORDS = """
    abe ada adam aida alan alba alec alex ali alma amir amos amy ana andy anke anna anne anton
    ari arlo asa axel ayla bea beck bela ben beth bill bo bob boris brad bram brian britt bruno
    buck cai cal cara carl carol cary cass cate chad chen chip cleo cody cole cora cory cruz curt
    cyrus dale dan dana dave dawn dean deb della dev diana diego dina dirk don dora drew duke dylan
    earl ed eden edith ela eli elise ella elmo elsa emil emma emmy enid enzo eric erin esme ethan
    eva evan ewan ezra faye felix fern finn fiona flo floyd fran frank fred fritz gabe gail gary
    gemma gene gil gina glen goran grace greg greta gus gwen hal hana hank hans hazel heidi helen
    henry holly hope hugo ian ida igor ike ilse ines inga ira iris irma isla ivan ivy jack jade
    jake jan jane jay jean jeff jill jim joan joel john jon jose josh joy juan jude judy jules
    june karl kate kay keith ken kim kirk klaus kofi kurt kyle lana lars laura lea lena leo levi
    lia lila lily lin lisa liv liz lois lola luca lucy luis luke luna lydia mara marc mary matt
    maud max maya meg mia mick mike milo mina mira moe mona nancy nash ned neil nell nick nico nina
    noah nora olaf olga omar opal oscar otis otto owen pam paul peggy perry pete petra phil pia
"""
NAMES: tuple[str, ...] = tuple(WORDS.split())

DIGITS_PER_NUMBER = 4
MAX_ENTRIES = 64


@dataclass(frozen=True)
class Sample:
    """One question about one list, as text."""

    prompt: str
    answer: str


def make_sample(rng: random.Random, entries: int) -> Sample:
    """Return a fresh list of ``entries`` distinct names with numbers, and a question about one."""
    names = rng.sample(NAMES, entries)
    numbers = [f"{rng.randrange(10**DIGITS_PER_NUMBER):04d}" for _ in names]
    asked = rng.randrange(entries)
    listing = ", ".join(f"{name} {number}" for name, number in zip(names, numbers, strict=True))
    return Sample(prompt=f"{listing}; {names[asked]}?", answer=numbers[asked])


def make_samples(rng: random.Random, count: int, entries: int | None) -> list[Sample]:
    """Return ``count`` samples of ``entries`` entries each, of 1..64 where ``entries`` is None."""
    return [make_sample(rng, rng.randint(1, MAX_ENTRIES) if entries is None else entries) for _ in range(count)]

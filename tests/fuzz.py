"""Inputs that nobody meant, and what a command line of ours does with them: done, or one line and exit code 2."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pipeline.core.atomic import PARTIAL

DONE, REFUSED = 0, 2
LONGEST = 2000  # characters of the one line


def many(examples: int, cases: st.SearchStrategy[Any], attempt: Callable[[Any], int]) -> Counter:
    """`attempt` on this many cases, the same ones every time; how often it was done, how often refused."""
    ends: Counter[int] = Counter()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(cases)
    def once(case: Any) -> None:
        ends[attempt(case)] += 1

    once()
    return ends


def run(module: str, *argv: object) -> int:
    """A module of ours as a command line, in this process: its exit code, which is 0 or 2.

    What ends in any other way, or in more than one line, fails the test; so does a warning a user would see.
    """
    said, errors, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [module, *map(str, argv)]
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said):
            warnings.filterwarnings("error", module=r"PIL|pipeline|stages|exporters")
            with contextlib.redirect_stderr(errors):
                runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as left:
        code = left.code or DONE
    finally:
        sys.argv = before
    line = errors.getvalue()
    assert code in (DONE, REFUSED), line
    if code == REFUSED:
        assert line.count("\n") == 1 and line.isascii() | line[:-1].isprintable(), line[:LONGEST]
        assert ": error: " in line and len(line) <= LONGEST, line[:LONGEST]
    said.getvalue().encode("utf-8")
    return int(code)


def whole_or_absent(out: Path, code: int) -> None:
    """An output is there after success and only then, and nothing unfinished lies beside it."""
    assert out.exists() == (code == DONE), f"{out} after exit code {code}"
    litter = [p.name for p in out.parent.iterdir() if p.name.endswith(PARTIAL)]
    assert not litter, litter


TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, -1, 1, 2**31, 2**32, 2**63, 2**64, 10**30, 10**400]),
    st.floats(allow_nan=True, allow_infinity=True),
)
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, TEXT)
VALUES = st.recursive(
    PLAIN, lambda v: st.lists(v, max_size=4) | st.dictionaries(TEXT, v, max_size=4), max_leaves=8
)

# Damage to the bytes of a file: (where, as a share of its length; what to do there)
DAMAGE = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.one_of(
            st.tuples(st.just("flip"), st.integers(0, 7)),
            st.tuples(st.just("put"), st.binary(min_size=1, max_size=9)),
            st.tuples(st.just("cut"), st.integers(0, 64)),
            st.tuples(st.just("end"), st.just(0)),
            st.tuples(st.just("add"), st.binary(min_size=1, max_size=40)),
        ),
    ),
    min_size=1,
    max_size=3,
)


def damaged(data: bytes, damage: list[tuple[float, tuple[str, Any]]]) -> bytes:
    """The bytes with every damage done to them in turn."""
    found = bytearray(data)
    for share, (kind, what) in damage:
        at = int(share * len(found))
        if kind == "flip" and found:
            found[at] ^= 1 << what
        elif kind == "put":
            found[at : at + len(what)] = what
        elif kind == "cut":
            del found[at : at + what]
        elif kind == "end":
            del found[at:]
        elif kind == "add":
            found[at:at] = what
    return bytes(found)


@st.composite
def edited(draw: st.DrawFn, document: Any, *kept: str) -> Any:
    """A JSON document in which one to three places hold something else or are gone, but for the keys `kept`."""
    found = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 3))):
        place, key = found, None
        while isinstance(place, dict | list) and len(place) > (len(kept) if place is found else 0):
            keys = (
                [k for k in place if k not in kept]
                if isinstance(place, dict)
                else range(len(place))
            )
            if key is not None and draw(st.integers(0, 3)) == 0:
                break
            holder, key = place, draw(st.sampled_from(keys))
            place = holder[key]
        if key is None:
            return draw(VALUES)
        what = draw(st.sampled_from(["other", "other", "gone", "near"]))
        if what == "gone":
            del holder[key]
        elif what == "near" and isinstance(place, int | float | str):
            holder[key] = draw(near(place))
        else:
            holder[key] = draw(VALUES)
    return found


def near(value: Any) -> st.SearchStrategy[Any]:
    """A value of the same kind, a little beside."""
    if isinstance(value, bool):
        return st.just(not value)
    if isinstance(value, int | float):
        return st.sampled_from([-value, value + 1, value - 1, value * 2, value * 10**9, str(value)])
    return st.sampled_from([value[:-1], value + "x", value.upper(), value * 3, "../" + value, ""])

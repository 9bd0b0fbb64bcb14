"""Every argument of transformers' generate and every name of its Cache was decided about, and is right or refused."""

from __future__ import annotations

import pytest
from old_versions import OLD_TRANSFORMERS

from xkv_fx.evaluation.coverage.generation import (
    Answer,
    Pair,
    Verdict,
    _compared,
    argument_names,
    as_text,
    cache_names,
)

WRONG_IN_OLD = {"max_batch_size": "2 instead of -1", "reset": "instead of"}
"""What older versions of transformers get wrong themselves: a cache that was reset keeps its length, for one."""


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair()


@pytest.mark.parametrize("name", argument_names())
def test_arguments_of_generate(pair: Pair, name: str) -> None:
    verdict = pair.judge_argument(name)
    assert verdict.outcome not in ("failed", "not tried"), verdict.reason
    if verdict.outcome == "refused":
        assert verdict.reason


@pytest.mark.parametrize("name", cache_names())
def test_names_of_cache(pair: Pair, name: str) -> None:
    verdict = pair.judge_name(name)
    if OLD_TRANSFORMERS and name in WRONG_IN_OLD:
        assert WRONG_IN_OLD[name] in verdict.reason
        return
    assert verdict.outcome not in ("failed", "not tried"), verdict.reason


def test_what_differs_is_seen() -> None:
    wrong = ValueError("not theirs")
    assert _compared("name", Answer(1), Answer(2)).outcome == "failed"
    assert _compared("name", Answer(1), Answer(error=wrong)).outcome == "failed"
    assert _compared("name", Answer(error=wrong), Answer(2)) == Verdict("name", "failed", "ValueError: not theirs")


def test_the_text() -> None:
    said = as_text("argument", [Verdict("a", "right"), Verdict("b", "refused", "no | way"), Verdict("c", "right")])
    assert said.splitlines()[0] == "Right: `a`, `c`."
    assert said.splitlines()[-1] == "| `b` | refused | no / way |"

"""Many requests, answered by everybody: the same tokens, in no more bytes, and figures that add up."""

from __future__ import annotations

import json
from typing import Any

import pytest
from old_versions import OLD_TRANSFORMERS
from ready_models import model, remember_captures, remember_programs
from typer.testing import CliRunner

from xkv_fx import Budgets
from xkv_fx.cli import app
from xkv_fx.errors import BackendError, PromptError
from xkv_fx.evaluation.speed.many_bench import CONTESTANTS, ManySettings, run_many_bench

SMALL: dict[str, Any] = {"requests": 5, "prompt": (3, 30), "answer": (2, 9), "rows": 2, "backend": "eager"}
FULL = Budgets.full(2, 40)


@pytest.fixture(autouse=True)
def _captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    remember_captures(monkeypatch)
    remember_programs(monkeypatch)


def test_everybody_answers_alike_in_no_more_bytes() -> None:
    found = run_many_bench(model(), ManySettings(FULL, **SMALL))
    assert [run.name for run in found.runs] == list(CONTESTANTS)
    ours = found.runs[0]
    assert ours.kv_bytes == FULL.kv_bytes(model(), 3)
    runs = list(found.runs)
    if OLD_TRANSFORMERS:
        assert "does not let its continuous batching have pages" in str(runs.pop().skipped)
    for run in runs:
        assert run.skipped is None
        assert run.same == 5
        assert run.seconds is not None
        assert run.tokens_per_second == pytest.approx(found.settings["answer_tokens"] / run.seconds)
        assert run.kv_bytes is not None
        assert run.kv_bytes <= ours.kv_bytes
    assert json.loads(json.dumps(found.to_dict()))["settings"]["requests"] == 5


def test_who_has_no_room_for_a_request_is_skipped() -> None:
    settings = ManySettings(Budgets((8, 8)), **{**SMALL, "requests": 2})
    runs = {run.name: run for run in run_many_bench(model(), settings).runs}
    for name in ("padded", "continuous"):
        assert "do not hold one request of 39 tokens" in str(runs[name].skipped)
    assert runs["ours"].same == 2
    assert runs["ours-padded"].skipped is None


def test_without_ours_there_is_nothing_to_be_the_same_as() -> None:
    found = run_many_bench(model(), ManySettings(FULL, **SMALL, only=("padded",)))
    assert [(run.name, run.same) for run in found.runs] == [("padded", None)]


def test_requests_are_the_same_for_the_same_seed() -> None:
    asked = ManySettings(FULL, requests=200, prompt=(3, 30), answer=(2, 9)).asked(61)
    assert asked == ManySettings(FULL, requests=200, prompt=(3, 30), answer=(2, 9)).asked(61)
    assert asked != ManySettings(FULL, requests=200, prompt=(3, 30), answer=(2, 9), seed=1).asked(61)
    assert {len(request.prompt) for request in asked} == set(range(3, 31))
    assert {request.max_new_tokens for request in asked} == set(range(2, 10))
    assert {token for request in asked for token in request.prompt} == set(range(61))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": (0, 3)}, "tokens of prompt must be from 1 on"),
        ({"answer": (5, 4)}, "tokens of answer"),
        ({"only": ("theirs",)}, "unknown contestant 'theirs'"),
    ],
)
def test_sizes_and_names_that_there_are_not(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        run_many_bench(model(), ManySettings(FULL, **{**SMALL, **changed}))


def test_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xkv_fx.hf.models.load_model", lambda name: (model(), None))
    options = [
        "bench",
        "--many",
        "--requests",
        "3",
        "--prompt-tokens",
        "3,30",
        "--answer-tokens",
        "2,9",
        "--batch",
        "2",
    ]
    options += ["--batch", "2", "--fraction", "100%", "--only", "ours,padded", "--backend", "eager"]
    result = CliRunner().invoke(app, [*options, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.strip().splitlines()[-1])
    assert found["settings"]["capacities"] == [39, 39]
    assert [run["same"] for run in found["runs"]] == [3, 3]
    assert "padded" in CliRunner().invoke(app, options).stdout
    for wrong in ("3", "3,x", "1,2,3"):
        assert isinstance(CliRunner().invoke(app, ["bench", "--many", "--prompt-tokens", wrong]).exception, PromptError)

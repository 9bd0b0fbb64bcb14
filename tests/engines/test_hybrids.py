"""Engines of hybrids: prompts loop over their tokens, and the file says what the layers keep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hybrid_models
import pytest
import torch
from batches import padded
from exhaustive import exhaustive
from hybrid_models import tokens, transformed

import xkv_fx
from xkv_fx import Budgets, Policy
from xkv_fx.engines.manifest import inputs_of
from xkv_fx.engines.records import read_states, write_states
from xkv_fx.engines.token_loops import with_token_loops
from xkv_fx.errors import FileFormatError, UnsupportedModelError
from xkv_fx.lowering.budgeted import Budgeted
from xkv_fx.runtime.recurrence import StatePart
from xkv_fx.runtime.state import GraphKind

READ_AGAIN = Policy(scorer="reconstruction", scorer_options={"instruction": "5 6"})


def prompt(llm: Budgeted) -> tuple[torch.Tensor, ...]:
    """A prompt of two rows, and empty buffers."""
    ids, valid = padded([tokens(1, 9), tokens(1, 6, seed=2)], "left", fill=7)
    feeding = llm.new_session().session.begin_feed(ids, valid=valid)  # type: ignore[attr-defined]
    return (*feeding.inputs, *(tensor.clone() for tensor in llm.new_session().session.state.tensors))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("family", "policy", "kinds"),
    [
        ("lfm2", READ_AGAIN, ("extend",)),
        pytest.param("lfm2", Policy(), ("prefill", "extend"), marks=exhaustive),
        pytest.param("qwen3_5_text", READ_AGAIN, ("prefill", "extend"), marks=exhaustive),
    ],
)
def test_a_loop_over_tokens_computes_what_the_models_code_does(
    family: str, policy: Policy, kinds: tuple[GraphKind, ...]
) -> None:
    count = len(hybrid_models.captured(family, 2).layers)
    llm = transformed(family, Budgets((8,) * count, policy), rows=2)
    ours, theirs = prompt(llm), prompt(llm)
    for kind in kinds:
        module = llm.program.graphs.get(kind).module
        with torch.no_grad():
            torch.testing.assert_close(with_token_loops(module)(*ours), module(*theirs), atol=1e-4, rtol=0)
        for one, other in zip(ours[3:], theirs[3:], strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


@exhaustive
@pytest.mark.parametrize("target", ["pt2", "aoti"])
def test_an_engine(target: str, tmp_path: Path) -> None:
    llm = transformed("lfm2", rows=2)
    xkv_fx.export(llm, tmp_path / "engine", target=target)
    engine = xkv_fx.load(tmp_path / "engine", trust=True)
    assert engine.other_state_bytes == llm.other_state_bytes > 0
    ids, valid = padded([tokens(1, 11), tokens(1, 7, seed=1)], "left", fill=7)
    expected = llm.generate(ids, attention_mask=valid.long(), max_new_tokens=8, do_sample=False)
    assert torch.equal(engine.generate(ids, 8, attention_mask=valid.long()), expected)


def test_tensorrt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedModelError, match="1 recurrent layers, whose states engines of the target 'tensorrt'"
    ):
        xkv_fx.export(transformed("lfm2", rows=2), tmp_path / "engine", target="tensorrt")


def test_states_are_written_and_read() -> None:
    recurrent = (
        (StatePart("conv", (64, 4), torch.bfloat16), StatePart("recurrent", (4, 8, 8), torch.float32)),
        (StatePart("conv1", (32, 3), torch.float32),),
    )
    assert read_states(json.loads(json.dumps(write_states(recurrent)))) == recurrent


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ([[]], "a layer without states"),
        ([3], "a layer without states"),
        ([[{"name": "conv", "shape": ["S", 3], "dtype": "float32"}]], "a state 'conv' of the shape"),
        ([[{"name": "conv", "shape": [0, 3], "dtype": "float32"}]], "a state 'conv' of the shape"),
        ([[{"name": "../k", "shape": [3], "dtype": "float32"}]], "a state '../k'"),
        ([[{"name": "conv", "shape": [3], "dtype": "object"}]], "dtype"),
    ],
)
def test_states_of_no_layer_are_refused(changed: Any, what: str) -> None:
    with pytest.raises(FileFormatError, match=what):
        read_states(changed)


def test_packages_take_them() -> None:
    plan = transformed("lfm2", rows=2).program.plan
    taken = {spec.name: spec.shape for spec in inputs_of("extend", plan)}
    assert list(taken)[-3:] == ["conv_0", "seen", "base"]
    assert taken["conv_0"] == (2, 32, 3)

"""Plans that give each KV head a capacity, and formats: what is accepted, what their files hold, how bytes are
counted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xkv_fx import Budgets
from xkv_fx.budgets import Plan
from xkv_fx.errors import BudgetError, FileFormatError
from xkv_fx.heads import HeadGroup, heads_in_words, runs_of
from xkv_fx.layers import LayerSpec
from xkv_fx.policy import Policy

GQA = LayerSpec(query_heads=8, kv_heads=4, key_dim=16, value_dim=32, itemsize=4)
SLIDING = dataclasses.replace(GQA, sliding_window=32)
MLA = LayerSpec(query_heads=8, kv_heads=1, key_dim=24, value_dim=0, itemsize=2)
LAYERS = (GQA, SLIDING, MLA)
BY_HEAD = Budgets(
    ((16, 5, 16, 40), (100, 31, 40, 1), 7),
    Policy(eviction="append"),
    formats=((None, ("int8", "int4"), None, None), ("int8", "int8"), None),
)


def changed(path: Path, **changes: Any) -> Budgets:
    path.write_text(json.dumps({**BY_HEAD.to_dict(), **changes}))
    return Budgets.load(path)


def test_a_number_is_a_plan_by_layer_and_a_sequence_one_by_head() -> None:
    assert Budgets((8, [4, 6])).capacities == (8, (4, 6))  # type: ignore[arg-type]
    assert BY_HEAD.by_head
    assert Budgets((8, 4), formats=(None, (("int8", "int8"), None))).by_head
    assert not Budgets((8, 4), formats=(("int8", "int4"), None)).by_head


@pytest.mark.parametrize(
    ("capacities", "message"),
    [
        (((4, 0), 8), "the capacity of layer 0, KV head 1 must be at least 1; got 0"),
        ((8, (4, 2.5)), "the capacity of layer 1, KV head 1 must be a whole number; got 2.5"),
        ((8, (4, True)), "the capacity of layer 1, KV head 1 must be a whole number"),
        ((8, ((4,),)), "the capacity of layer 1, KV head 0 must be a whole number"),
        ((8, ()), "the capacity of layer 1 is an empty sequence; give one number for each KV head"),
        ((8, "44"), "the capacity of layer 1 must be a whole number"),
    ],
)
def test_capacities_of_heads_that_make_no_sense_are_refused_by_layer_and_head(capacities: Any, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budgets(capacities)


def test_formats_of_heads_are_checked_by_layer_and_head() -> None:
    with pytest.raises(BudgetError, match="unknown format 'int3' of the values of layer 1, KV head 2"):
        Budgets((8, 8), formats=(None, (None, None, ("int8", "int3"))))  # type: ignore[arg-type]
    assert Budgets((8, 8), formats=((None, ("model", "model")), None)).formats is None


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Budgets(((4, 4), 8, 8)), "2 capacities for the KV heads of layer 0, which has 4; give one for each of them"),
        (Budgets((8, 8, (8, 8))), "2 capacities for the KV heads of layer 2, which has 1"),
        (Budgets((8, 8, 8), formats=(None, (None, ("int8", "int8")), None)), "2 formats for the KV heads of layer 1"),
    ],
)
def test_another_number_of_heads_is_refused(plan: Budgets, message: str) -> None:
    for use in (plan.check_layers, plan.kv_bytes, plan.slots, plan.groups):
        with pytest.raises(BudgetError, match=message):
            use(LAYERS)


def test_formats_that_one_head_cannot_be_stored_in_are_refused() -> None:
    plan = Budgets((8,), formats=((None, ("int8", "int8"), None, None),))
    with pytest.raises(BudgetError, match="the plan stores keys of layer 0 as int8"):
        plan.check_layers((dataclasses.replace(GQA, key_dim=12),))


def test_heads_of_equal_plans_share_a_cache_those_that_fill_their_window_too() -> None:
    assert BY_HEAD.groups(LAYERS) == (
        HeadGroup(0, (0, 2), 16, None),
        HeadGroup(0, (1,), 5, ("int8", "int4")),
        HeadGroup(0, (3,), 40, None),
        HeadGroup(1, (0, 2), 32, ("int8", "int8")),
        HeadGroup(1, (1,), 31, ("int8", "int8")),
        HeadGroup(1, (3,), 1, ("int8", "int8")),
        HeadGroup(2, (0,), 7, None),
    )


def test_slots_and_means() -> None:
    assert BY_HEAD.slots(LAYERS, 3) == ((19, 8, 19, 43), (32, 32, 32, 4), 10)
    assert BY_HEAD.every_capacity == (16, 5, 16, 40, 100, 31, 40, 1, 7)
    assert BY_HEAD.layer_means == (19, 43, 7)
    assert BY_HEAD.total_tokens == 69  # of 19.25 + 43 + 7
    assert Budgets(((3, 4), (3, 4))).total_tokens == 7


def capacities(layers: tuple[LayerSpec, ...]) -> st.SearchStrategy[Any]:
    tokens = st.integers(1, 50)
    return st.tuples(*(st.one_of(tokens, st.tuples(*[tokens] * spec.kv_heads)) for spec in layers))


def formats(layers: tuple[LayerSpec, ...]) -> st.SearchStrategy[Any]:
    pairs = st.sampled_from([None, ("int8", "int8"), ("int8", "int4"), ("model", "int4")])
    return st.tuples(
        *(st.one_of(pairs, st.tuples(*[pairs] * spec.kv_heads)) if spec.value_dim else st.none() for spec in layers)
    )


@given(capacities(LAYERS), formats(LAYERS), st.sampled_from(["append", "ring"]), st.integers(0, 20))
def test_bytes_are_the_sum_over_heads(given_capacities: Any, given_formats: Any, eviction: Any, room: int) -> None:
    plan = Budgets(given_capacities, Policy(eviction=eviction), formats=given_formats)
    expected = 0
    for spec, capacity, stored in zip(LAYERS, plan.capacities, plan.layer_formats, strict=True):
        one_head = dataclasses.replace(spec, query_heads=spec.query_heads // spec.kv_heads, kv_heads=1)
        for head in range(spec.kv_heads):
            of_head = capacity[head] if isinstance(capacity, tuple) else capacity
            pair: Any = stored[head] if stored and not isinstance(stored[0], str) else stored
            slots = one_head.effective_capacity(of_head + (room if eviction == "append" else 0))
            expected += slots * one_head.slot_bytes(formats=pair)
    assert plan.kv_bytes(LAYERS, batch_size=3, max_new_tokens=room) == 3 * expected


@given(capacities(LAYERS), formats(LAYERS))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, given_capacities: Any, given_formats: Any) -> None:
    plan = Budgets(given_capacities, formats=given_formats)
    path = tmp_path_factory.getbasetemp() / "by_head.json"
    plan.save(path)
    assert Budgets.load(path) == plan
    assert hash(Budgets.load(path)) == hash(plan)
    content = json.loads(path.read_bytes())
    assert content["version"] == (4 if plan.by_head else 1 if plan.formats is None else 2)


def test_equal_heads_take_the_bytes_and_groups_of_a_plan_by_layer() -> None:
    by_layer = Budgets((16, 40, 7), formats=(("int8", "int4"), None, None))
    by_head = Budgets(((16,) * 4, (40,) * 4, (7,)), formats=((("int8", "int4"),) * 4, None, None))
    assert by_head != by_layer
    assert by_head.groups(LAYERS) == by_layer.groups(LAYERS)
    assert by_head.kv_bytes(LAYERS) == by_layer.kv_bytes(LAYERS)
    assert by_head.total_tokens == by_layer.total_tokens


@pytest.mark.parametrize("version", [1, 2, 3])
def test_older_versions_hold_no_plans_by_head(tmp_path: Path, version: int) -> None:
    fields = {"formats": None} if version == 1 else {"formats": [None, None, None]}
    content = {**BY_HEAD.to_dict(), **fields, "version": version}
    if version == 1:
        del content["formats"]
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(FileFormatError, match=f"plan.json: version {version} has no capacities or formats of single"):
        Budgets.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capacities": [[16, 5], [], 7]}, "the capacity of layer 1 is an empty sequence"),
        ({"capacities": [[16, [5]], 8, 7]}, "layer 0, KV head 1 must be a whole number"),
        ({"formats": [[None, "int8"], None, None]}, "unknown format None"),
        ({"formats": {"0": None}}, "formats"),
        ({"version": 5}, "newer"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FileFormatError, match=rf"plan.json: .*{message}"):
        changed(tmp_path / "plan.json", **changes)


def test_other_engines_get_means_and_are_told_what_is_lost() -> None:
    carried = Budgets(((16, 5), 10)).to("tensorrt-llm")
    assert carried["settings"]["max_attention_window"] == [10, 10]
    assert "no sizes of single KV heads, so those are lost" in carried["note"]
    assert "single KV heads" not in Budgets((16, 10)).to("tensorrt-llm")["note"]


@pytest.mark.parametrize(
    ("heads", "runs", "words"),
    [
        ((2,), [(2, 3)], "KV head 2"),
        ((0, 1, 2), [(0, 3)], "KV heads 0-2"),
        ((0, 2, 3, 7), [(0, 1), (2, 4), (7, 8)], "KV heads 0, 2-3, 7"),
    ],
)
def test_runs_of_heads(heads: tuple[int, ...], runs: list[tuple[int, int]], words: str) -> None:
    assert runs_of(heads) == runs
    assert heads_in_words(heads) == words


def test_plans_by_head_need_no_model_library() -> None:
    assert Plan(((4, 2),)).kv_bytes((dataclasses.replace(MLA, kv_heads=2),)) == (4 + 2) * 24 * 2

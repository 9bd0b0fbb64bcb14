"""Budgets and Policy: what is accepted, what is refused and how, what a plan's file holds, how bytes are counted."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xkv_fx import Budgets
from xkv_fx.budgets import FORMAT_VERSION, Plan, Provenance
from xkv_fx.errors import BudgetError, FileFormatError, ModelMismatchError
from xkv_fx.formats import SLOT_FORMATS
from xkv_fx.layers import LayerSpec
from xkv_fx.policy import EVICTIONS, Policy

GQA = LayerSpec(query_heads=8, kv_heads=2, key_dim=16, value_dim=16, itemsize=4)
SLIDING = dataclasses.replace(GQA, sliding_window=32)
MLA = LayerSpec(query_heads=8, kv_heads=1, key_dim=24, value_dim=16, itemsize=2)

RICH = Budgets(
    capacities=(16, 1, 4096),
    policy=Policy("snapkv", {"observation_window": 8, "kernel": 7, "mix": 0.5, "mode": "mean"}, "scored", 4, 2),
    provenance=Provenance(
        model="llama-é",
        allocator="xkv",
        constraint={"fraction": 0.384},
        context=4096,
        source="ab" * 32,
        expected_retention=0.97,
        held_out={"kl": 0.01, "against_uniform": [0.1, None]},
    ),
)


def saved(budgets: Budgets, path: Path) -> dict[str, Any]:
    budgets.save(path)
    content: dict[str, Any] = json.loads(path.read_bytes())
    return content


def load_changed(path: Path, **changes: Any) -> Budgets:
    """Load RICH's file after changing top-level fields of it; `...` takes a field out."""
    content = {**saved(RICH, path), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}), encoding="utf-8")
    return Budgets.load(path)


def load_unless_refused(path: Path) -> Budgets | None:
    """The plan, or None where the file is refused with its name; anything else fails the test."""
    try:
        return Budgets.load(path)
    except FileFormatError as error:
        if path.name not in str(error):
            raise
        return None


# Capacities


@pytest.mark.parametrize(
    "given_capacities",
    [
        (4, 8, 15),
        [4, 8, 15],
        (np.int64(4), np.int32(8), np.uint8(15)),
        list(np.array([4, 8, 15])),
        (torch.tensor(4), 8, 15),
    ],
    ids=["tuple", "list", "numpy-ints", "numpy-list", "torch-int"],
)
def test_capacities_become_a_tuple_of_python_ints(given_capacities: Any) -> None:
    budgets = Budgets(given_capacities)
    assert budgets.capacities == (4, 8, 15)
    assert [type(c) for c in budgets.capacities] == [int, int, int]
    assert budgets.total_tokens == 27
    assert budgets == Budgets((4, 8, 15))
    assert hash(budgets.capacities) == hash((4, 8, 15))


@pytest.mark.parametrize(
    "bad", [True, False, np.True_, torch.tensor(True), 4.0, np.float32(4), 4.5, float("nan"), "4", None, {4}], ids=repr
)
def test_capacity_that_is_no_whole_number_is_refused_by_its_layer(bad: Any) -> None:
    with pytest.raises(BudgetError, match=rf"capacity of layer 1 must be a whole number; got {re.escape(repr(bad))}"):
        Budgets((4, bad, 4))


@pytest.mark.parametrize("bad", [0, -1, np.int64(-5)], ids=repr)
def test_capacity_below_one_is_refused_by_its_layer(bad: Any) -> None:
    with pytest.raises(BudgetError, match=rf"capacity of layer 2 must be at least 1; got {bad}"):
        Budgets((4, 4, bad))


@pytest.mark.parametrize(
    "bad", [4, "444", {4, 8}, {4: 8}, iter([4]), None, np.array([4, 8])], ids=lambda v: type(v).__name__
)
def test_capacities_that_are_no_sequence_are_refused(bad: Any) -> None:
    with pytest.raises(BudgetError, match="must be a sequence of whole numbers"):
        Budgets(bad)


@pytest.mark.parametrize("empty", [(), []])
def test_no_capacities_are_refused(empty: Any) -> None:
    with pytest.raises(BudgetError, match="empty"):
        Budgets(empty)


@pytest.mark.parametrize("policy", ["snapkv", None, {}, Policy], ids=repr)
def test_policy_of_another_type_is_refused(policy: Any) -> None:
    with pytest.raises(BudgetError, match=r"policy must be an xkv_fx\.Policy"):
        Budgets((4,), policy)


def test_uniform_and_full() -> None:
    uniform = Budgets.uniform(3, 64)
    assert (uniform.capacities, uniform.policy, uniform.total_tokens) == ((64, 64, 64), Policy(), 192)
    assert uniform.provenance.allocator == "uniform"
    assert Budgets.uniform(2, 8, Policy(sinks=1)).policy == Policy(sinks=1)
    full = Budgets.full(np.int64(3), np.int64(64))  # type: ignore[arg-type]
    assert (full.capacities, full.policy.eviction) == ((64, 64, 64), "none")
    assert full.provenance.allocator == "full"


@pytest.mark.parametrize("make", [Budgets.uniform, Budgets.full])
@pytest.mark.parametrize(
    ("layers", "tokens"), [(0, 4), (-1, 4), (2.0, 4), (True, 4), (2, 0), (2, 1.5), (2, True), (None, 4)]
)
def test_uniform_and_full_refuse_what_makes_no_plan(make: Any, layers: Any, tokens: Any) -> None:
    with pytest.raises(BudgetError):
        make(layers, tokens)


def test_plans_are_frozen_values() -> None:
    assert Budgets((4,)) == Budgets([4])  # type: ignore[arg-type]
    assert Budgets((4,)) != Budgets((5,))
    assert Budgets((4,)) != Budgets((4,), Policy(sinks=1))
    for value, name in ((RICH, "capacities"), (RICH.policy, "sinks"), (RICH.provenance, "model"), (GQA, "kv_heads")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, 1)
    assert pickle.loads(pickle.dumps(RICH)) == RICH  # plans reach worker processes; files are never pickles


# Policy


def test_default_policy_is_the_papers() -> None:
    policy = Policy()
    assert (policy.scorer, policy.eviction, policy.recent, policy.sinks) == ("snapkv", "ring", None, 0)


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_every_eviction_is_accepted(eviction: Any) -> None:
    assert Policy(eviction=eviction).eviction == eviction


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eviction": "lru"}, "unknown eviction 'lru'; choose one of ring, scored, append, none"),
        ({"eviction": None}, "unknown eviction None"),
        ({"eviction": ["ring"]}, "unknown eviction"),
        ({"scorer": ""}, "scorer must be the name"),
        ({"scorer": None}, "scorer must be the name"),
        ({"scorer": 3}, "scorer must be the name"),
        ({"recent": 0}, "recent must be a whole number of at least 1, or None; got 0"),
        ({"recent": -1}, "recent must be"),
        ({"recent": 2.0}, "recent must be"),
        ({"recent": True}, "recent must be"),
        ({"recent": "8"}, "recent must be"),
        ({"sinks": -1}, "sinks must be a whole number of at least 0; got -1"),
        ({"sinks": 1.0}, "sinks must be"),
        ({"sinks": True}, "sinks must be"),
        ({"sinks": None}, "sinks must be"),
        ({"scorer_options": None}, "scorer_options must be a mapping"),
        ({"scorer_options": [("kernel", 7)]}, "scorer_options must be a mapping"),
        ({"scorer_options": {"kernel": True}}, "option 'kernel' must be"),
        ({"scorer_options": {"kernel": None}}, "option 'kernel'"),
        ({"scorer_options": {"kernel": [7]}}, "option 'kernel'"),
        ({"scorer_options": {7: 7}}, "option 7"),
    ],
    ids=lambda v: repr(v) if isinstance(v, dict) else "",
)
def test_policy_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=re.escape(message)):
        Policy(**fields)


def test_policies_are_equal_and_hash_alike_whatever_the_order_of_options() -> None:
    one = Policy(scorer_options={"kernel": 7, "observation_window": 8})
    other = Policy(scorer_options={"observation_window": 8, "kernel": 7})
    assert one == other
    assert hash(one) == hash(other)
    assert list(one.scorer_options) == list(other.scorer_options)
    assert one != Policy(scorer_options={"kernel": 5, "observation_window": 8})


def test_options_are_copied() -> None:
    options: dict[str, int | float | str] = {"kernel": 7}
    policy = Policy(scorer_options=options)
    options["kernel"] = 5
    assert policy.scorer_options == {"kernel": 7}


@pytest.mark.parametrize(
    ("capacity", "recent"), [(1, 1), (3, 1), (4, 1), (7, 1), (8, 2), (255, 63), (256, 64), (260, 64), (10**6, 64)]
)
def test_recent_is_a_quarter_between_1_and_64_unless_given(capacity: int, recent: int) -> None:
    assert Policy().recent_for(capacity) == recent


@pytest.mark.parametrize(("recent", "capacity", "kept"), [(8, 100, 8), (8, 8, 8), (8, 5, 5), (100, 1, 1), (1, 100, 1)])
def test_given_recent_is_clamped_to_the_capacity(recent: int, capacity: int, kept: int) -> None:
    assert Policy(recent=recent).recent_for(capacity) == kept


@pytest.mark.parametrize(
    ("recent", "sinks", "capacity", "kept"),
    [(None, 0, 8, 0), (None, 4, 8, 4), (None, 7, 8, 6), (8, 4, 8, 0), (9, 4, 8, 0), (3, 4, 5, 2), (None, 4, 1, 0)],
)
def test_sinks_take_what_recent_leaves(recent: int | None, sinks: int, capacity: int, kept: int) -> None:
    assert Policy(recent=recent, sinks=sinks).sinks_for(capacity) == kept


@given(st.none() | st.integers(1, 300), st.integers(0, 300), st.integers(1, 300))
def test_recent_and_sinks_always_fit_into_the_capacity(recent: int | None, sinks: int, capacity: int) -> None:
    policy = Policy(recent=recent, sinks=sinks)
    assert 1 <= policy.recent_for(capacity) <= capacity
    assert 0 <= policy.sinks_for(capacity) <= capacity - policy.recent_for(capacity)


# The file


@pytest.mark.parametrize("budgets", [RICH, Budgets((1,)), Budgets.uniform(2, 7), Budgets.full(2, 7)])
@pytest.mark.parametrize("as_path", [str, Path])
def test_round_trip(tmp_path: Path, budgets: Budgets, as_path: type) -> None:
    budgets.save(as_path(tmp_path / "budgets.json"))
    assert Budgets.load(as_path(tmp_path / "budgets.json")) == budgets


options = st.dictionaries(
    st.text(), st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(), max_size=4
)
policies = st.builds(
    Policy,
    st.text(min_size=1),
    options,
    st.sampled_from(EVICTIONS),
    st.none() | st.integers(min_value=1),
    st.integers(min_value=0),
)
pairs = st.none() | st.tuples(st.sampled_from(SLOT_FORMATS), st.sampled_from(SLOT_FORMATS))


@st.composite
def plans(draw: st.DrawFn) -> Budgets:
    capacities = draw(st.lists(st.integers(min_value=1), min_size=1).map(tuple))
    count = len(capacities)
    formats = draw(st.none() | st.lists(pairs, min_size=count, max_size=count).map(tuple))
    return Budgets(capacities, draw(policies), formats=formats)


@given(plans())
def test_round_trip_of_any_plan(tmp_path_factory: pytest.TempPathFactory, budgets: Budgets) -> None:
    path = tmp_path_factory.getbasetemp() / "any_plan.json"
    budgets.save(path)
    loaded = Budgets.load(path)
    assert loaded == budgets
    assert loaded.formats == budgets.formats
    assert hash(loaded) == hash(budgets)


def test_file_is_plain_json_with_format_and_version(tmp_path: Path) -> None:
    assert saved(Budgets((2, np.int64(3))), tmp_path / "b.json") == {  # type: ignore[arg-type]
        "format": "xkv_fx.budgets",
        "version": 1,
        "capacities": [2, 3],
        "policy": {"scorer": "snapkv", "scorer_options": {}, "eviction": "ring", "recent": None, "sinks": 0},
        "provenance": {
            **dict.fromkeys(("model", "allocator", "constraint", "context", "source")),
            **dict.fromkeys(("expected_retention", "expected_kl", "held_out")),
        },
    }


def test_every_cut_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "budgets.json"
    RICH.save(path)
    whole = path.read_bytes()
    for length in range(len(whole) - 1):  # the last byte is a line end, which says nothing
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match=r"budgets\.json"):
            Budgets.load(path)


def test_damaged_bytes_are_refused_or_still_make_a_valid_plan(tmp_path: Path) -> None:
    path = tmp_path / "budgets.json"
    RICH.save(path)
    whole = path.read_bytes()
    chance = random.Random(0)
    refused = 0
    for _ in range(1000):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged)
        budgets = load_unless_refused(path)
        refused += budgets is None
        assert budgets is None or min(budgets.capacities) >= 1
    assert refused > 800


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.sampled_from([RICH, dataclasses.replace(RICH, formats=(("int8", "int4"), None, None))]),
    st.sampled_from(["capacities", "policy", "provenance", "version", "format", "formats"]),
    json_values,
)
def test_any_value_of_a_field_is_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, plan: Budgets, field: str, value: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "any_field.json"
    content = {**saved(plan, path), field: value}
    path.write_text(json.dumps(content), encoding="utf-8")
    budgets = load_unless_refused(path)
    assert budgets is None or min(budgets.capacities) >= 1


@given(st.sampled_from(["scorer", "scorer_options", "eviction", "recent", "sinks"]), json_values)
def test_any_value_of_a_policy_field_is_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, field: str, value: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "any_policy.json"
    content = saved(RICH, path)
    content["policy"][field] = value
    path.write_text(json.dumps(content), encoding="utf-8")
    budgets = load_unless_refused(path)
    assert budgets is None or budgets.policy.to_dict()[field] == value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "xkv_fx.profile"}, "not a xkv_fx.budgets file"),
        ({"format": ...}, "not a xkv_fx.budgets file"),
        ({"version": FORMAT_VERSION + 1}, "upgrade xkv_fx"),
        ({"version": 0}, "version 0"),
        ({"version": "1"}, "version '1'"),
        ({"version": True}, "version True"),
        ({"version": ...}, "version None"),
        ({"kv_heads": 4, "also": 1}, "unknown fields 'also', 'kv_heads'"),
        ({"capacities": ...}, "'capacities' is missing or not a list"),
        ({"capacities": None}, "'capacities' is missing or not a list"),
        ({"capacities": {"0": 4}}, "'capacities' is missing or not a list"),
        ({"capacities": "444"}, "'capacities' is missing or not a list"),
        ({"capacities": []}, "empty"),
        ({"capacities": [4, True]}, "layer 1 must be a whole number; got True"),
        ({"capacities": [4, 4.0]}, "layer 1 must be a whole number; got 4.0"),
        ({"capacities": [4, "4"]}, "layer 1 must be a whole number; got '4'"),
        ({"capacities": [[4], 4]}, "version 1 has no capacities or formats of single KV heads"),
        ({"capacities": [4, 0]}, "layer 1 must be at least 1; got 0"),
        ({"capacities": [4, None]}, "layer 1 must be a whole number; got None"),
        ({"policy": ...}, "policy must be a JSON object"),
        ({"policy": "snapkv"}, "policy must be a JSON object, not str"),
        ({"policy": {"size": 8}}, "unknown policy fields 'size'"),
        ({"policy": {}}, "the policy lacks 'eviction', 'recent', 'scorer', 'scorer_options', 'sinks'"),
        ({"policy": {"scorer": "snapkv", "recent": None, "sinks": 0}}, "the policy lacks 'eviction', 'scorer_options'"),
        ({"policy": {**RICH.policy.to_dict(), "eviction": "lru"}}, "unknown eviction 'lru'"),
        ({"policy": {**RICH.policy.to_dict(), "eviction": {}}}, "unknown eviction {}"),
        ({"policy": {**RICH.policy.to_dict(), "sinks": 0.5}}, "sinks must be"),
        ({"policy": {**RICH.policy.to_dict(), "scorer_options": [1]}}, "scorer_options must be a mapping"),
        ({"policy": {**RICH.policy.to_dict(), "scorer_options": {"kernel": [7]}}}, "option 'kernel'"),
        ({"provenance": None}, "provenance must be a JSON object, not NoneType"),
        ({"provenance": [1]}, "provenance must be a JSON object, not list"),
        ({"provenance": {"author": "me"}}, "unknown provenance field 'author'"),
        ({"provenance": {"context": "4096"}}, "'context' has the wrong type: '4096'"),
        ({"provenance": {"context": True}}, "'context' has the wrong type: True"),
        ({"provenance": {"model": 7}}, "'model' has the wrong type: 7"),
        ({"provenance": {"constraint": 0.384}}, "'constraint' has the wrong type"),
        ({"provenance": {"expected_retention": "high"}}, "'expected_retention' has the wrong type"),
        ({"provenance": {"held_out": []}}, "'held_out' has the wrong type"),
    ],
    ids=lambda v: json.dumps(v, default=lambda _: "left out") if isinstance(v, dict) else "",
)
def test_wrong_content_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FileFormatError, match=re.escape(message)) as caught:
        load_changed(tmp_path / "budgets.json", **changes)
    assert "budgets.json" in str(caught.value)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("place", ['"capacities": [4, %s]', '"provenance": {"expected_retention": %s}'])
def test_numbers_that_json_lacks_are_refused(tmp_path: Path, number: str, place: str) -> None:
    path = tmp_path / "budgets.json"
    path.write_text('{"format": "xkv_fx.budgets", "version": 1, ' + place % number + "}", encoding="utf-8")
    with pytest.raises(FileFormatError, match=f"{number} is not a JSON number"):
        Budgets.load(path)


def test_capacity_too_large_for_a_float_is_not_rounded(tmp_path: Path) -> None:
    path = tmp_path / "budgets.json"
    Budgets((2**60 + 1,)).save(path)
    assert Budgets.load(path).capacities == (2**60 + 1,)
    path.write_text(path.read_text().replace(str(2**60 + 1), "1e999"))
    with pytest.raises(FileFormatError, match=r"budgets\.json"):
        Budgets.load(path)


def test_huge_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "budgets.json"
    RICH.save(path)
    os.truncate(path, 1 << 36)  # a hole: 64 GiB that take no disk
    with pytest.raises(FileFormatError, match="larger than"):
        Budgets.load(path)


def test_missing_file_is_an_ordinary_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Budgets.load(tmp_path / "missing.json")


# Bytes


@pytest.mark.parametrize(
    ("layer", "bytes_"), [(GQA, 2 * (16 + 16) * 4), (MLA, 1 * (24 + 16) * 2), (SLIDING, 2 * (16 + 16) * 4)]
)
def test_slot_bytes(layer: LayerSpec, bytes_: int) -> None:
    assert layer.slot_bytes() == bytes_
    assert layer.slot_bytes(torch.float16) == bytes_ * 2 // layer.itemsize
    assert layer.slot_bytes(torch.float8_e4m3fn) == bytes_ // layer.itemsize


def test_query_heads_cost_no_cache() -> None:
    assert dataclasses.replace(GQA, query_heads=64).slot_bytes() == GQA.slot_bytes()


@pytest.mark.parametrize("capacity", [1, 31, 32, 33, 10**6])
def test_sliding_window_clamps_the_capacity(capacity: int) -> None:
    assert SLIDING.effective_capacity(capacity) == min(capacity, 32)
    assert GQA.effective_capacity(capacity) == capacity


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_only_append_sets_room_aside(eviction: Any) -> None:
    budgets = Budgets((10, 100, 20), Policy(eviction=eviction))
    layers = (GQA, SLIDING, MLA)
    assert budgets.slots(layers) == (10, 32, 20)
    room = 5 if eviction == "append" else 0
    assert budgets.slots(layers, max_new_tokens=5) == (10 + room, 32, 20 + room)


def test_room_never_goes_beyond_the_sliding_window() -> None:
    append = Policy(eviction="append")
    assert Budgets((32,), append).slots((SLIDING,), max_new_tokens=7) == (32,)
    assert Budgets((100,), append).slots((SLIDING,), max_new_tokens=7) == (32,)
    assert Budgets((20,), append).slots((SLIDING,), max_new_tokens=7) == (27,)
    assert Budgets((20,), append).slots((SLIDING,), max_new_tokens=12) == (32,)
    assert Budgets((20,), append).slots((SLIDING,), max_new_tokens=400) == (32,)
    assert Budgets((20,), append).kv_bytes((SLIDING,), max_new_tokens=400) == 32 * SLIDING.slot_bytes()


@pytest.mark.parametrize("as_sequence", [tuple, list])
def test_kv_bytes_are_slots_times_slot_bytes_times_rows(as_sequence: type) -> None:
    budgets, layers = Budgets((10, 100, 20)), as_sequence([GQA, SLIDING, MLA])
    one_row = 10 * 256 + 32 * 256 + 20 * 80
    assert budgets.kv_bytes(layers) == one_row
    assert budgets.kv_bytes(layers, batch_size=3) == 3 * one_row
    assert budgets.kv_bytes(layers, max_new_tokens=64) == one_row
    append = dataclasses.replace(budgets, policy=Policy(eviction="append"))
    assert append.kv_bytes(layers, batch_size=2, max_new_tokens=5) == 2 * (15 * 256 + 32 * 256 + 25 * 80)


def test_kv_bytes_in_another_dtype() -> None:
    budgets, layers = Budgets((10, 100, 20)), (GQA, SLIDING, MLA)
    elements = 10 * 64 + 32 * 64 + 20 * 40
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int8):
        assert budgets.kv_bytes(layers, dtype=dtype) == elements * dtype.itemsize
    assert budgets.kv_bytes(layers, dtype=np.dtype("float16")) == elements * 2


def test_kv_bytes_equal_those_of_the_tensors() -> None:
    rows, budgets, layers = 3, Budgets((10, 40)), (GQA, MLA)
    dtypes = {4: torch.float32, 2: torch.float16}
    tensors = [
        torch.empty(rows, layer.kv_heads, slots, dim, dtype=dtypes[layer.itemsize])
        for layer, slots in zip(layers, budgets.slots(layers), strict=True)
        for dim in (layer.key_dim, layer.value_dim)
    ]
    assert budgets.kv_bytes(layers, batch_size=rows) == sum(tensor.nbytes for tensor in tensors)


@dataclasses.dataclass(frozen=True)
class Transformed:
    layers: tuple[LayerSpec, ...]


def test_kv_bytes_of_what_carries_its_layers() -> None:
    assert Budgets((1, 2)).kv_bytes(Transformed((GQA, MLA))) == 256 + 2 * 80


def test_the_plan_on_the_ground_reads_no_model() -> None:
    assert Plan((1, 2)).kv_bytes(Transformed((GQA, MLA))) == Plan((1, 2)).kv_bytes((GQA, MLA)) == 256 + 2 * 80
    for ask in (Plan((1, 2)).kv_bytes, Plan((1, 2)).slots, Plan((1, 2)).check_layers):
        with pytest.raises(BudgetError, match=r"LayerSpecs or a transformed model, not a Linear; xkv_fx\.Budgets"):
            ask(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


# Does the plan fit the model?


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_layers_is_refused(count: int) -> None:
    with pytest.raises(BudgetError, match=rf"2 capacities but the model has {count} layers"):
        Budgets((4, 4)).check_layers((GQA,) * count)
    with pytest.raises(BudgetError, match=rf"2 capacities but the model has {count} layers"):
        Budgets((4, 4)).kv_bytes((GQA,) * count)


def test_plan_for_another_model_is_refused() -> None:
    plan = Budgets((4,), provenance=Provenance(model="a" * 8))
    with pytest.raises(ModelMismatchError, match=r"made for the model 'aaaaaaaa', not for 'bbbbbbbb'.*solve for this"):
        plan.check_layers((GQA,), "b" * 8)
    plan.check_layers((GQA,), "a" * 8)
    plan.check_layers((GQA,))
    Budgets((4,)).check_layers((GQA,), "b" * 8)


# What is refused or made right at the border


def test_bytes_are_no_capacities() -> None:
    with pytest.raises(BudgetError, match="must be a sequence of whole numbers"):
        Budgets(b"abc")  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True, "2", None], ids=repr)
def test_kv_bytes_of_an_impossible_batch_are_refused(batch_size: Any) -> None:
    with pytest.raises(BudgetError, match="batch_size must be a whole number of at least 1"):
        Budgets((4,)).kv_bytes((GQA,), batch_size=batch_size)


@pytest.mark.parametrize("max_new_tokens", [-1, 1.5, True, "2", None], ids=repr)
@pytest.mark.parametrize("eviction", ["append", "ring"])
def test_impossible_room_is_refused(max_new_tokens: Any, eviction: Any) -> None:
    with pytest.raises(BudgetError, match="max_new_tokens must be a whole number of at least 0"):
        Budgets((4,), Policy(eviction=eviction)).kv_bytes((GQA,), max_new_tokens=max_new_tokens)


def test_slots_for_another_number_of_layers_are_refused_as_everywhere() -> None:
    with pytest.raises(BudgetError, match="1 capacities but the model has 2 layers"):
        Budgets((4,)).slots((GQA, GQA))


def test_plan_with_numpy_numbers_is_saved(tmp_path: Path) -> None:
    counts = {"recent": np.int64(3), "sinks": np.int32(1), "scorer_options": {"kernel": np.int64(7)}}
    plan = Budgets((8,), Policy(**counts), Provenance(context=np.int64(64), expected_retention=np.float64(0.5)))  # type: ignore[arg-type]
    plan.save(tmp_path / "budgets.json")
    assert Budgets.load(tmp_path / "budgets.json") == plan


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_option_that_no_file_can_hold_is_refused(number: float) -> None:
    with pytest.raises(BudgetError, match="scorer option 'mix'"):
        Policy(scorer_options={"mix": number})


@pytest.mark.parametrize(
    "fields",
    [{"context": "64"}, {"context": 0}, {"context": True}, {"model": 7}, {"expected_retention": float("nan")}],
    ids=repr,
)
def test_provenance_is_checked_where_it_is_made(fields: dict[str, Any]) -> None:
    with pytest.raises(BudgetError, match=next(iter(fields))):
        Provenance(**fields)


def test_provenance_of_another_type_is_refused() -> None:
    with pytest.raises(BudgetError, match="provenance"):
        Budgets((4,), provenance={"model": "x"})  # type: ignore[arg-type]


def test_solved_plans_can_be_hashed() -> None:
    assert hash(RICH) == hash(dataclasses.replace(RICH))


def test_number_too_large_for_a_float_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "budgets.json"
    RICH.save(path)
    path.write_text(path.read_text().replace("0.384", "1e999"))
    with pytest.raises(FileFormatError, match="1e999"):
        Budgets.load(path)


def test_saved_plan_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    RICH.save(tmp_path / "budgets.json")
    (tmp_path / "other.json").touch()
    assert (tmp_path / "budgets.json").stat().st_mode == (tmp_path / "other.json").stat().st_mode


# Other engines


def test_per_layer_engines_get_the_capacities_and_say_what_is_lost(tmp_path: Path) -> None:
    plan = Budgets((64, 256, 128), Policy(sinks=4))
    carried = plan.to("tensorrt-llm", tmp_path / "settings.json")
    assert carried["settings"] == {"max_attention_window": [64, 256, 128], "sink_token_length": 4}
    assert "newest tokens" in carried["note"]
    assert json.loads((tmp_path / "settings.json").read_text()) == carried
    assert Budgets((8,)).to("tensorrt-llm")["settings"] == {"max_attention_window": [8]}
    carried = plan.to("executorch")
    assert carried["settings"] == {"layer_sizes": [64, 256, 128]}
    assert "4 sinks of the plan are not kept" in carried["note"]


@pytest.mark.parametrize(("mean", "sinks"), [(96, 0), (100, 4), (1000, 40)])
def test_openvino_gets_whole_blocks_within_the_mean(mean: int, sinks: int) -> None:
    carried = Budgets((mean - 10, mean + 10), Policy(sinks=sinks)).to("openvino")
    settings = carried["settings"]
    assert all(size % 32 == 0 and size > 0 for size in settings.values())
    assert mean - 32 < settings["max_cache_size"] <= mean
    assert settings["start_size"] >= sinks
    assert settings["start_size"] + settings["recent_size"] < settings["max_cache_size"]
    assert "one size for all layers" in carried["note"]


@pytest.mark.parametrize(
    ("plan", "engine", "message"),
    [
        (Budgets((64,)), "vllm", "unknown engine 'vllm'; choose one of tensorrt-llm, executorch, openvino"),
        (Budgets((95,)), "openvino", "which needs 96"),
    ],
)
def test_what_cannot_be_carried_is_refused(plan: Budgets, engine: str, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        plan.to(engine)

"""Formats of slots in plans: one normal form, their bytes, and a file that keeps them."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sealed_json import sealed

import xkv_fx
from xkv_fx import Budgets, LayerSpec
from xkv_fx.engines.manifest import NAME, Manifest
from xkv_fx.errors import BudgetError, FileFormatError
from xkv_fx.formats import CODE_BITS, SLOT_FORMATS, checked_formats, group_of, pair_name, vector_bytes
from xkv_fx.runtime.quantize import Coding

FILES = Path(__file__).parent / "files_of_0_1"
LAYER = LayerSpec(8, 2, 16, 16, 4)
INT8 = (("int8", "int4"), None)
pairs = st.none() | st.tuples(st.sampled_from(SLOT_FORMATS), st.sampled_from(SLOT_FORMATS))


def plan(formats: Any = INT8) -> Budgets:
    return Budgets((12, 16), formats=formats)


# The normal form


@pytest.mark.parametrize("formats", [None, (None, None), [["model", "model"], None], (("model", "model"),) * 2])
def test_plans_in_the_models_dtype_are_one_plan(formats: Any) -> None:
    assert plan(formats).formats is None
    assert plan(formats) == Budgets((12, 16))
    assert hash(plan(formats)) == hash(Budgets((12, 16)))


def test_a_pair_in_the_models_dtype_is_none() -> None:
    assert plan([["model", "model"], ["model", "fp8"]]).formats == (None, ("model", "fp8"))
    assert plan((("model", "model"), ("int8", "int4"))) == plan([None, ["int8", "int4"]])


@given(st.lists(pairs, min_size=2, max_size=2), st.lists(pairs, min_size=2, max_size=2))
def test_plans_that_store_alike_are_equal(one: list[Any], other: list[Any]) -> None:
    """And the normal form of a normal form is itself."""
    alike = [pair or ("model", "model") for pair in one] == [pair or ("model", "model") for pair in other]
    assert (plan(one) == plan(other)) == alike
    assert len({plan(one), plan(other)}) == (1 if alike else 2)
    assert checked_formats(plan(one).formats, 2) == plan(one).formats


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        ("int8", "formats must be a sequence of pairs of names, one for each capacity; got str"),
        ({"0": "int8"}, "formats must be a sequence"),
        (7, "formats must be a sequence"),
        ((), "formats has 0 entries for 2 capacities; give one for each of them"),
        ((("int8", "int8"),), "formats has 1 entries for 2 capacities"),
        (("int8", "int4"), "the formats of layer 0 must be None or a pair of names, of keys and of values; got 'int8'"),
        ((None, ("int8",)), "the formats of layer 1 must be None or a pair"),
        ((None, ("int8", "int8", "int8")), "the formats of layer 1 must be None or a pair"),
        ((None, "k8"), "the formats of layer 1 must be None or a pair of names, of keys and of values; got 'k8'"),
        (
            (None, ("int8", "int5")),
            "unknown format 'int5' of the values of layer 1; choose one of model, fp8, int8, int4",
        ),
        ((("INT8", "int8"), None), "unknown format 'INT8' of the keys of layer 0"),
        (((8, "int8"), None), "unknown format 8 of the keys of layer 0"),
        ((([], "int8"), None), "unknown format [] of the keys of layer 0"),
        (((None, "int8"), None), "unknown format None of the keys of layer 0"),
    ],
    ids=repr,
)
def test_what_are_no_formats_is_refused(formats: Any, message: str) -> None:
    with pytest.raises(BudgetError, match=re.escape(message)):
        plan(formats)


def test_other_capacities_need_other_formats() -> None:
    assert dataclasses.replace(plan(), capacities=(1, 2)).formats == INT8
    with pytest.raises(BudgetError, match="formats has 2 entries for 3 capacities"):
        dataclasses.replace(plan(), capacities=(1, 2, 3))


def test_a_pair_has_a_name() -> None:
    assert [pair_name(pair) for pair in (None, ("int4", "int4"), ("model", "int8"))] == ["model", "int4", "model/int8"]


# Bytes


@pytest.mark.parametrize(
    ("dim", "int8", "int4"),
    [(64, 68, 36), (80, 88, 48), (96, 104, 56), (128, 136, 72), (256, 272, 144), (8, 12, 8), (576, 612, 324)],
)
def test_a_vector_takes_its_codes_and_a_scale_and_a_zero_for_each_group(dim: int, int8: int, int4: int) -> None:
    assert (vector_bytes("int8", dim, 2), vector_bytes("int4", dim, 4)) == (int8, int4)
    assert vector_bytes("model", dim, 4) == 4 * dim
    assert vector_bytes("fp8", dim, 2) == dim + 2


@pytest.mark.parametrize("name", CODE_BITS)
def test_bytes_are_those_of_what_is_stored(name: Any) -> None:
    for dim in range(1, 300):
        if dim % 8 and name != "fp8":
            for refused in (lambda dim=dim: vector_bytes(name, dim, 4), lambda dim=dim: Coding.of(name, dim)):
                with pytest.raises(BudgetError, match=f"divides a head size of {dim}; store it in the model's dtype"):
                    refused()
            continue
        coding = Coding.of(name, dim)
        codes, scales = coding.encode(torch.ones(dim))
        assert vector_bytes(name, dim, 4) == coding.nbytes == codes.nbytes + scales.nbytes
        assert (CODE_BITS[name], dim if name == "fp8" else group_of(dim)) == (coding.bits, coding.group)


def test_slots_of_formats_are_counted() -> None:
    layer = LayerSpec(8, 2, 64, 128, 4, sliding_window=10)
    assert layer.slot_bytes(formats=("int8", "int4")) == 2 * (68 + 72)
    assert layer.slot_bytes(torch.float16, ("model", "int8")) == 2 * (64 * 2 + 136)
    assert layer.slot_bytes(formats=("model", "model")) == layer.slot_bytes()
    assert layer.slot_bytes(formats=("fp8", "model")) == 2 * (64 + 2 + 128 * 4)
    latent = LayerSpec(16, 1, 576, 0, 2)
    assert [latent.slot_bytes(formats=(name, name)) for name in SLOT_FORMATS] == [2 * 576, 578, 612, 324]
    append = xkv_fx.Policy(eviction="append")
    mixed = Budgets((12, 3), append, formats=(("int8", "int4"), None))
    assert mixed.kv_bytes((layer,) * 2, 5, max_new_tokens=2) == 5 * (10 * 2 * (68 + 72) + 5 * 2 * 192 * 4)
    assert mixed.kv_bytes((layer,) * 2, dtype=torch.float16) == 10 * 2 * (68 + 72) + 3 * 2 * 192 * 2


@pytest.mark.parametrize(
    ("layer", "pair", "message"),
    [
        (
            LayerSpec(8, 1, 24, 0, 4),
            ("int8", "fp8"),
            "as int8 and its values as fp8, but keys and values are one latent",
        ),
        (LayerSpec(8, 1, 24, 0, 4), ("model", "int8"), "give one format for both, not model and int8"),
        (LayerSpec(8, 1, 20, 0, 4), ("int8", "int8"), "no group of 8 to 64 elements divides a head size of 20"),
        (LayerSpec(8, 2, 16, 20, 4), ("int8", "int4"), "no group of 8 to 64 elements divides a head size of 20"),
    ],
)
def test_what_cannot_be_stored_is_refused(layer: LayerSpec, pair: Any, message: str) -> None:
    bad = plan((None, pair))
    for ask in (bad.check_layers, bad.slots, bad.kv_bytes):
        with pytest.raises(BudgetError, match=message):
            ask((LAYER, layer))
    with pytest.raises(BudgetError):
        layer.slot_bytes(formats=pair)
    assert plan((("int8", "int4"), ("int8", "model"))).slots((LAYER, LayerSpec(8, 2, 16, 20, 4))) == (12, 16)


# The file


def test_only_a_plan_with_formats_is_of_version_2(tmp_path: Path) -> None:
    """What 0.1 could say is written as it wrote it, so that it can be read there."""
    assert plan().to_dict() == {**Budgets((12, 16)).to_dict(), "version": 2, "formats": [["int8", "int4"], None]}
    assert Budgets((12, 16)).to_dict()["version"] == 1
    assert "formats" not in Budgets((12, 16)).to_dict()
    Budgets.load(FILES / "budgets.json").save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (FILES / "budgets.json").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "unknown fields 'formats'"),
        ({"version": 5}, "newer than 4"),
        ({"formats": ...}, "the plan lacks 'formats'"),
        ({"formats": None}, "formats of the plan has the wrong type: None"),
        ({"formats": {"0": ["int8", "int8"]}}, "formats of the plan has the wrong type"),
        ({"formats": [["int8", "int4"]]}, "formats has 1 entries for 2 capacities"),
        ({"formats": [["int8", "int3"], None]}, "unknown format 'int3' of the values of layer 0"),
        ({"formats": ["int8", "int4"]}, "the formats of layer 0 must be None or a pair"),
    ],
    ids=str,
)
def test_a_file_with_wrong_formats_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    data = {name: value for name, value in {**plan().to_dict(), **changes}.items() if value is not ...}
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(FileFormatError, match=f"plan.json: .*{message}"):
        Budgets.load(tmp_path / "plan.json")


def test_a_file_whose_formats_are_all_the_models_is_the_plan_without(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({**plan().to_dict(), "formats": [["model", "model"], None]}))
    assert Budgets.load(tmp_path / "plan.json") == Budgets((12, 16))


# Models and engines


def test_an_engine_stores_what_it_was_exported_with(tmp_path: Path) -> None:
    """Its programs hold the formats, so that a plan of other ones in its manifest is no plan of it."""
    data = json.loads((FILES / NAME).read_text())
    data["budgets"] = {**data["budgets"], "version": 2, "formats": INT8}
    (tmp_path / NAME).write_text(json.dumps(sealed(json.loads(json.dumps(data)))))
    with pytest.raises(FileFormatError, match=f"{NAME}: the budgets do not match .* it takes k_0 uint8"):
        Manifest.load(tmp_path)


def test_settings_of_other_engines_say_that_formats_are_lost() -> None:
    assert "formats" not in Budgets((12, 16)).to("executorch")["note"]
    assert plan().to("executorch")["settings"] == Budgets((12, 16)).to("executorch")["settings"]
    assert "the plan's formats are not carried over" in plan().to("executorch")["note"]

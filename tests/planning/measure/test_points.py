"""Which capacities and formats are measured when some formats are asked for."""

from __future__ import annotations

from typing import Any

import pytest

from xkv_fx import LayerSpec
from xkv_fx.errors import BudgetError
from xkv_fx.planning.measure.points import GRID, pairs_to_measure, points_to_measure

LAYER = LayerSpec(8, 2, 64, 64, 2)
INT8, INT4, BOTH = ("int8", "int8"), ("int4", "int4"), ("int8", "int4")


@pytest.mark.parametrize(
    ("formats", "pairs"),
    [
        (None, [None]),
        (("model",), [None]),
        (["int8"], [INT8]),
        (("model", "int8", "int4"), [None, INT8, INT4, BOTH]),
        (("int4", "int8", "int4"), [INT4, INT8, BOTH]),
        ((INT4, "int8"), [INT4, INT8]),
        (([["model", "int8"], "model"]), [("model", "int8"), None]),
        (("model", "fp8", "int4"), [None, ("fp8", "fp8"), INT4]),
    ],
)
def test_each_name_is_of_keys_and_values_alike_and_int8_keys_go_with_int4_values(formats: Any, pairs: Any) -> None:
    assert list(pairs_to_measure(formats)) == pairs


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        ("int8", "formats must be a sequence of names or pairs of names"),
        ((), "at least one"),
        (7, "formats must be a sequence"),
        (("int5",), "unknown format 'int5' of the keys of what is measured"),
        ((("int8", "int4", "int4"),), "the formats of what is measured must be None or a pair"),
    ],
)
def test_what_are_no_formats_to_measure_is_refused(formats: Any, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        pairs_to_measure(formats)


def test_latents_are_not_measured_with_other_formats_of_values() -> None:
    pairs = pairs_to_measure(("int8", "int4"), (LayerSpec(8, 1, 64, 0, 2),))
    assert list(pairs) == [INT8, INT4]


def test_the_models_dtype_alone_is_measured_as_without_formats() -> None:
    for pairs in (pairs_to_measure(None), pairs_to_measure(["model"])):
        points = points_to_measure(pairs, None, (LAYER,))
        assert (points.shares, points.formats) == (GRID, None)
        assert list(points_to_measure(pairs, (0.2, 0.4), (LAYER,))) == [(0.2, None), (0.4, None)]


def test_evicting_nothing_is_measured_in_all_but_the_models_dtype() -> None:
    points = list(points_to_measure(pairs_to_measure(("model", "int8", "int4")), (0.25, 0.5), (LAYER,)))
    assert points == [
        *((share, None) for share in (0.25, 0.5)),
        *((share, pair) for pair in (INT8, BOTH, INT4) for share in (0.25, 0.5, 1.0)),
    ]


def test_only_the_fewest_bytes_are_measured_down_to_few_tokens() -> None:
    points = points_to_measure(pairs_to_measure(("int4", "int8", "model")), None, (LAYER,))
    shares = {pair: [share for share, measured in points if measured == pair] for pair in (None, INT8, BOTH, INT4)}
    assert min(shares[INT4]) < min(shares[INT8]) == min(shares[BOTH]) < min(shares[None])
    assert len(points) <= 2.5 * len(GRID)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (LayerSpec(8, 2, 64, 20, 4), "layer 1 cannot be stored as int8: no group .* divides a head size of 20"),
        (LayerSpec(8, 1, 20, 0, 4), "layer 1 cannot be stored as int8: no group"),
    ],
)
def test_layers_that_cannot_be_stored_so_are_refused(layer: LayerSpec, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        points_to_measure((None, INT8), None, (LAYER, layer))
    assert len(points_to_measure((None,), None, (LAYER, layer))) == len(GRID)

"""A manifest's file holds every field, whatever it is annotated with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from sealed_json import sealed

from xkv_fx.engines.manifest import NAME, Manifest
from xkv_fx.engines.records import FileRecord, Machine, Package, TensorRTBuild, TensorSpec
from xkv_fx.errors import FileFormatError
from xkv_fx.layers import LayerSpec, layer_fields, layer_specs

FILES = Path(__file__).parents[1] / "files_of_0_1"
BUILD = TensorRTBuild("tensorrt_rtx", "1.3", "2.11", layers=40, caches_in_place=4, native_attentions=0)


@dataclasses.dataclass(frozen=True)
class Noted(Manifest):
    """A manifest with a field of a type that no other field has."""

    note: str | None = None


def manifest() -> Manifest:
    return Manifest.load(FILES)


def fields_of(made: Manifest) -> dict[str, Any]:
    return {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}


def test_a_field_that_nobody_says_how_to_store_is_not_dropped(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="note"):
        Noted(**fields_of(manifest()), note="kept").save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_field_is_in_the_file_and_is_read_again(tmp_path: Path) -> None:
    made = dataclasses.replace(
        manifest(), target="tensorrt", machine=Machine("2.11.0", "cuda", "x86_64", "sm_90"), tensorrt=BUILD,
        max_positions=None, end_tokens=(2, 3),
    )  # fmt: skip
    made.save(tmp_path)
    names = {field.name for field in dataclasses.fields(Manifest)}
    assert set(json.loads((tmp_path / NAME).read_text())) == {*names, "format", "version", "sha256"} - {"recurrent"}
    assert Manifest.load(tmp_path) == made


@pytest.mark.parametrize(
    "record",
    [
        BUILD,
        Machine("2.11.0", "cpu", "x86_64", "AVX512"),
        FileRecord(3, "0" * 64),
        TensorSpec("k", (1, "S", 0), "float32"),
        Package("decode.pt2", ("a",), (TensorSpec("k", (1,), "int64"),)),
    ],
    ids=lambda record: type(record).__name__,
)
def test_every_field_of_a_record_is_stored(record: Any) -> None:
    data = record.to_dict() if hasattr(record, "to_dict") else dataclasses.asdict(record)
    assert len(data) == len(dataclasses.fields(record))
    assert type(record).from_dict(json.loads(json.dumps(data))) == record


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("index", [0, 8])
def test_every_field_of_a_layer_is_stored(window: int | None, index: int) -> None:
    layer = LayerSpec(8, 2, 16, 0, 2, window, index)
    (stored,) = json.loads(json.dumps(layer_fields([layer])))
    assert set(stored) | {"index_dim"} == {field.name for field in dataclasses.fields(LayerSpec)}
    assert layer_specs([stored]) == (layer,)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("pad_token", -1, "its field 'pad_token' must be a whole number of at least 0; got -1"),
        ("max_positions", 0, "its field 'max_positions' must be a whole number of at least 1, or null; got 0"),
        ("end_tokens", [True], "its field 'end_tokens' has the wrong type"),
        ("longest", 1, "'longest' is 1, below 'shortest', which is 2"),
        ("packages", {}, "packages lacks 'decode', 'extend', 'prefill'"),
        ("weights", [{"name": "w", "shape": [1.5], "dtype": "float32"}], "shape of a tensor has the wrong type"),
        ("weights", [{"name": "w", "shape": [1], "dtype": "float63"}], "dtype of a tensor must be one of float64, "),
        ("files", {"weights.safetensors": {"bytes": -1, "sha256": ""}}, "bytes of a file must be"),
    ],
)
def test_a_wrong_field_is_said_by_name(tmp_path: Path, name: str, value: Any, message: str) -> None:
    data = json.loads((FILES / NAME).read_text())
    (tmp_path / NAME).write_text(json.dumps(sealed({**data, name: value})))
    with pytest.raises(FileFormatError, match=message) as raised:
        Manifest.load(tmp_path)
    assert NAME in str(raised.value)

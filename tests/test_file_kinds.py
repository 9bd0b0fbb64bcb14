"""A file of another kind is called what it is; one that is not there, or has no folder to be in, is one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ready_models
from safetensors.numpy import save_file
from tiny_models import random_ids

import xkv_fx
from xkv_fx import Budgets, Calibration, LayerSpec, Policy, Profile
from xkv_fx.errors import FileFormatError, MissingFileError
from xkv_fx.file_kinds import WORDS, kind_of_file
from xkv_fx.planning.data.load_measured import load_measured

LAYERS = (LayerSpec(query_heads=4, kv_heads=2, key_dim=8, value_dim=8, itemsize=4),) * 2
PROFILE = Profile((np.linspace(0, 1, 9, dtype=np.float32)[None].repeat(2, 0),), Policy(), LAYERS, "a model")
CALIBRATION = Calibration(np.ones((1, 2, 2), np.float32), (0.25, 0.5), (8,), 4, Policy(), LAYERS, "a model")
PLAN = Budgets((8, 8))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    named = {name: folder / name for name in ("budgets", "profile", "calibration", "session", "weights", "text")}
    PLAN.save(named["budgets"])
    PROFILE.save(named["profile"])
    CALIBRATION.save(named["calibration"])
    session = ready_models.transformed(PLAN).new_session()
    session.feed(random_ids(1, 5), None, None, False)
    session.save(named["session"])
    save_file({"weight": np.zeros(3, np.float32)}, named["weights"])
    named["text"].write_text("Once upon a time")
    return named


READERS: dict[str, Callable[[Path], Any]] = {
    "budgets": Budgets.load,
    "profile": Profile.load,
    "calibration": Calibration.load,
    "session": lambda path: ready_models.transformed(PLAN).new_session().load(path),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_says_what_a_file_is(files: dict[str, Path], reader: str) -> None:
    for kind, path in files.items():
        if kind == reader:
            READERS[reader](path)
            continue
        words = WORDS.get(kind)
        message = "" if words is None else f"^{path}: not a xkv_fx.{reader} file; it is {words}$"
        with pytest.raises(FileFormatError, match=message):
            READERS[reader](path)


def test_solve_takes_what_was_measured_alone(files: dict[str, Path]) -> None:
    assert load_measured(files["profile"]) == PROFILE
    assert load_measured(files["calibration"]) == CALIBRATION
    with pytest.raises(
        FileFormatError,
        match=r"budgets: not a xkv_fx\.calibration file; it is a plan",
    ):
        load_measured(files["budgets"])
    with pytest.raises(FileFormatError, match="weights: neither a profile nor a calibration"):
        load_measured(files["weights"])


def test_what_is_not_ours_has_no_kind(tmp_path: Path) -> None:
    strange = tmp_path / "strange"
    other_format, odd_format = b'{"format": "xkv_fx.other"}', b'{"format": ["xkv_fx.budgets"]}'
    huge, cut, empty = (
        (2**63).to_bytes(8, "little"),
        (4).to_bytes(8, "little") + b"n",
        (2).to_bytes(8, "little") + b"{}",
    )
    for content in (b"", b"{}", b"[]", b"\xff" * 40, b"{" * 5000, huge, cut, empty, other_format, odd_format):
        strange.write_bytes(content)
        assert kind_of_file(strange) is None


@pytest.mark.parametrize("reader", [*READERS, "measured"])
def test_a_missing_file_is_one_sentence(tmp_path: Path, reader: str) -> None:
    read = {**READERS, "measured": load_measured}[reader]
    with pytest.raises(MissingFileError, match=f"^there is no file {tmp_path}/nowhere$"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["plan", "profile", "calibration", "session"])
def test_so_is_a_missing_folder(tmp_path: Path, kind: str) -> None:
    saved = {"plan": PLAN, "profile": PROFILE, "calibration": CALIBRATION}
    thing: Any = saved.get(kind) or ready_models.transformed(PLAN).new_session()
    with pytest.raises(
        MissingFileError, match=f"^{tmp_path}/no/file cannot be written: there is no folder {tmp_path}/"
    ):
        thing.save(tmp_path / "no" / "file")
    assert isinstance(MissingFileError("..."), xkv_fx.XkvError | FileNotFoundError)

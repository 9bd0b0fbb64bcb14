"""The header of a session's file: exactly its fields, each in its range, before anything is taken from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ready_models
import safetensors
from safetensors.torch import save_file

from xkv_fx import Budgets
from xkv_fx.errors import FileFormatError
from xkv_fx.fields import HEADER
from xkv_fx.runtime.session import Session
from xkv_fx.runtime.session_file import load_session, save_session


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fed": -1}, "its field 'fed' must be a whole number of at least 0; got -1"),
        ({"fed": True}, "its field 'fed' has the wrong type: True"),
        ({"program": None}, "its field 'program' has the wrong type: None"),
        ({"sha256": ...}, "it lacks 'sha256'"),
        ({"also": 1}, "unknown field 'also'"),
        ({"fed": float("nan")}, "holds no JSON of a session"),
        ({"fed": 1}, "does not match its checksum"),
        ({}, None),
    ],
)
def test_the_header(tmp_path: Path, changes: dict[str, Any], message: str | None) -> None:
    session = Session(ready_models.transformed(Budgets((12, 16))).program)
    path = tmp_path / "session.safetensors"
    save_session(session, path)
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[HEADER])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = {name: value for name, value in {**header, **changes}.items() if value is not ...}
    save_file(tensors, path, {HEADER: json.dumps(header)})
    if message is None:
        load_session(session, path)
        return
    with pytest.raises(FileFormatError, match=f"session.safetensors: .*{message}"):
        load_session(session, path)

"""What an evaluation measured so far, kept in a folder, so that an interrupted run goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from xkv_fx.capture.captured import CapturedModel
from xkv_fx.errors import FileFormatError, ModelMismatchError
from xkv_fx.evaluation.quality.candidates import Entry
from xkv_fx.evaluation.quality.results import CONTINUATION_TASK, FULL, Row
from xkv_fx.evaluation.tasks import Instance
from xkv_fx.fields import DOCUMENT, NUMBER, OBJECT, TEXT, Fields, check_fields, list_of, whole
from xkv_fx.files import read_json, read_sealed_json, remove_kept, write_json, write_sealed_json
from xkv_fx.planning.measure.held_out import identity_of
from xkv_fx.planning.measure.weights import digest_of_weights

PART_FORMAT, RUN_FORMAT = "xkv_fx.evaluation_part", "xkv_fx.evaluation_run"
VERSION = 1
_RUN_FILE = "run.json"
_RUN: Fields = {**DOCUMENT, "model": list_of(TEXT), "length": whole(), "seed": whole()}
_PART: Fields = {**DOCUMENT, "values": OBJECT, "texts": list_of(TEXT), "kv_bytes": whole(0)}


class Parts:
    """What was measured so far, a file for each plan, task and form, named by a hash of all that it depends on.

    Args:
        folder: where to; made if it is missing.
        captured: the model.
        length, seed: what decided the examples.
        room: for generated tokens.
        dtype: that bytes are counted in; the model's own by default.

    Raises:
        ModelMismatchError: a folder of another model.
        FileFormatError: a folder of a run with other settings.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        captured: CapturedModel,
        length: int,
        seed: int,
        room: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.folder, self.room, self.counted_in = Path(folder), room, str(dtype or captured.dtype)
        self.base = [captured.fingerprint, str(captured.dtype), digest_of_weights(captured)]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_run({"model": self.base, "length": length, "seed": seed})

    def _check_run(self, run: dict[str, Any]) -> None:
        """Whose folder it is; tasks, forms, plans and the number of examples may differ."""
        path = self.folder / _RUN_FILE
        if not path.exists():
            write_json(path, {"format": RUN_FORMAT, "version": VERSION, **run})
            return
        before = read_json(path, RUN_FORMAT, VERSION)
        try:
            check_fields(before, _RUN)
        except FileFormatError as error:
            raise FileFormatError(f"{path}: {error!s:.1000} (name another folder, or delete it)") from error
        if before["model"] != run["model"]:
            raise ModelMismatchError(
                f"{self.folder} holds what was measured of another model; name another folder, or delete it"
            )
        other = [
            f"{name} {before[name]!r} instead of {value!r}" for name, value in run.items() if before[name] != value
        ]
        if other:
            raise FileFormatError(
                f"{self.folder} holds what another run measured ({', '.join(other)}); name another folder, or delete it"
            )

    def _path(self, entry: Entry, task: str, form: str, made: Sequence[Instance]) -> Path:
        plan: list[Any] = [entry.name, entry.size]
        if entry.budgets is not None and entry.name != FULL:  # how much more room than needed that has is no matter
            plan = [identity_of(entry.budgets), self.room if entry.budgets.policy.eviction == "append" else 0]
        described = json.dumps([VERSION, self.base, self.counted_in, plan, task, form], sort_keys=True)
        digest = hashlib.sha256(described.encode())
        for instance in made:
            digest.update(json.dumps([instance.answers, instance.new_tokens, instance.context.shape[1]]).encode())
            digest.update(instance.prompt.cpu().numpy().astype("<i8").tobytes())
        return self.folder / f"{digest.hexdigest()}.json"

    def read(self, entry: Entry, task: str, form: str, made: Sequence[Instance]) -> Row | None:
        """A row that was measured before, if there is a sound one."""
        path = self._path(entry, task, form, made)
        if not path.is_file():
            return None
        metrics = ("kl", "nll_change", "agreement") if task == CONTINUATION_TASK else ("score",)
        try:
            data = check_fields(read_sealed_json(path, PART_FORMAT, VERSION), _PART)
            values = check_fields(data["values"], dict.fromkeys(metrics, list_of(NUMBER)), "values")
        except FileFormatError:
            return None  # damaged: measured again
        if any(len(part) != len(made) for part in (*values.values(), data["texts"])):
            return None
        policy = None if entry.budgets is None else entry.budgets.policy
        kept = {name: tuple(part) for name, part in values.items()}
        return Row(entry.name, entry.size, policy, task, form, data["kv_bytes"], kept, tuple(data["texts"]))

    def write(self, entry: Entry, task: str, form: str, made: Sequence[Instance], row: Row) -> None:
        """Keep a row."""
        write_sealed_json(
            self._path(entry, task, form, made),
            {
                "format": PART_FORMAT,
                "version": VERSION,
                "values": {name: list(each) for name, each in row.values.items()},
                "texts": list(row.texts),
                "kv_bytes": row.kv_bytes,
            },
        )


def remove_parts(folder: str | os.PathLike[str]) -> None:
    """Delete what was kept in a `resume` folder, and the folder unless something else is in it."""
    remove_kept(folder, ".json", _RUN_FILE)

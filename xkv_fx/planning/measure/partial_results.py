"""What was measured so far, kept in a folder, so that an interrupted measurement goes on."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from torch import Tensor

from xkv_fx.capture.captured import CapturedModel
from xkv_fx.files import SEAL, remove_kept, written_whole
from xkv_fx.planning.measure.team import Arrays
from xkv_fx.planning.measure.weights import digest_of_weights


class PartialResults:
    """What was measured so far, a file for each prompt, named by a hash of all that the result depends on.

    Attributes:
        folder: where the files are; None for nowhere.
        captured: the model.
        settings: what else results depend on, of JSON's types.
        expected: shape and dtype of each array of a result.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        captured: CapturedModel,
        settings: Sequence[Any],
        expected: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]],
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.captured = captured
        self.settings = list(settings)
        self.expected = dict(sorted(expected.items()))
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def of(self, setting: Any) -> PartialResults:
        """Results that depend on one more setting."""
        return PartialResults(self.folder, self.captured, [*self.settings, setting], self.expected)

    @functools.cached_property
    def base(self) -> str:
        """All that a result depends on but its prompt."""
        described = [self.captured.fingerprint, str(self.captured.dtype), *self.settings]
        return json.dumps(described, sort_keys=True) + digest_of_weights(self.captured)

    def results(self, ids: Tensor, measure: Callable[[], Arrays]) -> Arrays:
        """What was measured of a prompt, or is now, and kept."""
        found = self._read(ids)
        if found is None:
            found = measure()
            self._write(ids, found)
        return found

    def _path(self, ids: Tensor) -> Path | None:
        if self.folder is None:
            return None
        tokens = ids.cpu().numpy().astype("<i8").tobytes()
        return self.folder / f"{hashlib.sha256(self.base.encode() + tokens).hexdigest()}.safetensors"

    def _read(self, ids: Tensor) -> Arrays | None:
        """The result for a prompt, if there is a sound one."""
        path = self._path(ids)
        if path is None or not path.is_file():
            return None
        try:
            with safetensors.safe_open(path, framework="np") as file:
                found = {name: file.get_tensor(name) for name in sorted(file.keys())}
                told = (file.metadata() or {}).get(SEAL)
        except safetensors.SafetensorError:
            return None  # damaged: measured again
        sound = {name: (array.shape, array.dtype) for name, array in found.items()} == self.expected
        return found if sound and told == _digest(found) else None

    def _write(self, ids: Tensor, result: Arrays) -> None:
        """Keep the result for a prompt."""
        path = self._path(ids)
        if path is not None:
            with written_whole(path) as temporary:
                safetensors.numpy.save_file(dict(result), temporary, {SEAL: _digest(result)})


def _digest(result: Arrays) -> str:
    digest = hashlib.sha256()
    for _, array in sorted(result.items()):
        digest.update(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).data)
    return digest.hexdigest()


def remove_parts(folder: str | os.PathLike[str]) -> None:
    """Delete what was kept in a `resume` folder, and the folder unless something else is in it."""
    remove_kept(folder, ".safetensors")

"""Reading a file that is either a profile or a calibration."""

from __future__ import annotations

import os

import safetensors

from xkv_fx.errors import FileFormatError
from xkv_fx.file_kinds import kind_of_file
from xkv_fx.files import check_safetensors_size
from xkv_fx.planning.data import calibration_data, profile_data
from xkv_fx.planning.data.calibration_data import Calibration
from xkv_fx.planning.data.measured_file import reading
from xkv_fx.planning.data.profile_data import Profile

MEASURED = (profile_data.FORMAT, calibration_data.FORMAT)


def load_measured(path: str | os.PathLike[str]) -> Profile | Calibration:
    """A profile or a calibration, whichever the file says that it is.

    Raises:
        FileFormatError: neither, or damaged; the message names the file.
        MissingFileError: no such file.
    """
    with reading(path, calibration_data.FORMAT, "Measure again."):
        kind = kind_of_file(path)
        if kind not in MEASURED:
            check_safetensors_size(path, profile_data.MAX_PROFILE_BYTES)
            with safetensors.safe_open(os.fspath(path), framework="np"):
                raise FileFormatError("neither a profile nor a calibration")
    return Profile.load(path) if kind == profile_data.FORMAT else Calibration.load(path)

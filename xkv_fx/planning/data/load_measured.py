"""Reading a file that is either a profile or a calibration."""

from __future__ import annotations

import os

import safetensors

from xkv_fx.errors import FileFormatError
from xkv_fx.fields import HEADER
from xkv_fx.files import check_safetensors_size, parse_json
from xkv_fx.planning.data import calibration_data, profile_data
from xkv_fx.planning.data.calibration_data import Calibration
from xkv_fx.planning.data.measured_file import reading
from xkv_fx.planning.data.profile_data import Profile


def load_measured(path: str | os.PathLike[str]) -> Profile | Calibration:
    """A profile or a calibration, whichever the file says that it is.

    Raises:
        FileFormatError: neither, or damaged; the message names the file.
        FileNotFoundError: no such file.
    """
    with reading(path, "Measure again."):
        check_safetensors_size(path, profile_data.MAX_PROFILE_BYTES)
        with safetensors.safe_open(os.fspath(path), framework="np") as file:
            metadata = file.metadata() or {}
    try:
        header = parse_json(metadata.get(HEADER, ""))
    except ValueError:
        header = None
    kind = header.get("format") if isinstance(header, dict) else None
    if kind == profile_data.FORMAT:
        return Profile.load(path)
    if kind == calibration_data.FORMAT:
        return Calibration.load(path)
    raise FileFormatError(f"{os.fspath(path)}: neither a profile nor a calibration")

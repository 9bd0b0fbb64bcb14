"""Reading a file that is either a profile or a calibration."""

from __future__ import annotations

import json
import os

import safetensors

from xkv_fx.errors import FileFormatError
from xkv_fx.files import check_safetensors_size
from xkv_fx.planning import calibration_data, profile_data
from xkv_fx.planning.calibration_data import Calibration
from xkv_fx.planning.measured_file import HEADER
from xkv_fx.planning.profile_data import Profile


def load_measured(path: str | os.PathLike[str]) -> Profile | Calibration:
    """A profile or a calibration, whichever the file says that it is.

    Raises:
        FileFormatError: neither, or damaged; the message names the file.
        FileNotFoundError: no such file.
    """
    name = os.fspath(path)
    try:
        check_safetensors_size(path, profile_data.MAX_PROFILE_BYTES)
        with safetensors.safe_open(name, framework="np") as file:
            header = json.loads((file.metadata() or {}).get(HEADER, ""))
    except safetensors.SafetensorError as error:
        raise FileFormatError(f"{name}: not a whole safetensors file ({error}); was it cut off?") from error
    except FileFormatError as error:
        raise FileFormatError(f"{name}: {error}") from error
    except (ValueError, RecursionError):
        header = None
    kind = header.get("format") if isinstance(header, dict) else None
    if kind == profile_data.FORMAT:
        return Profile.load(path)
    if kind == calibration_data.FORMAT:
        return Calibration.load(path)
    raise FileFormatError(f"{name}: neither a profile nor a calibration")

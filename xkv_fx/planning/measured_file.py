"""What the files of profiles and calibrations have in common: a header of JSON in a safetensors file's metadata."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from xkv_fx.budgets import LayerSpec
from xkv_fx.errors import FileFormatError
from xkv_fx.files import check_format, is_int

HEADER = "xkv_fx"  # the key of our JSON in the file's metadata


def read_header(metadata: dict[str, str] | None, kind: str, newest: int, fields: Mapping[str, type]) -> dict[str, Any]:
    """Our JSON from the file's metadata, with format, version and the types of its fields checked.

    Raises:
        FileFormatError: it is not as said; the message does not name the file.
    """
    try:
        header = json.loads((metadata or {}).get(HEADER, ""))
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"its metadata holds no JSON of a {kind.rpartition('.')[2]}") from error
    header = check_format(header, kind, newest)
    if set(header) != set(fields):
        raise FileFormatError(f"its fields are {', '.join(sorted(header))} instead of {', '.join(sorted(fields))}")
    for name, expected in fields.items():
        if not isinstance(header[name], expected):
            raise FileFormatError(f"its field {name!r} has the wrong type: {header[name]!r:.100}")
    return header


def layer_specs(layers: list[Any]) -> tuple[LayerSpec, ...]:
    """LayerSpecs from JSON objects, every number a whole one of at least 1.

    Raises:
        FileFormatError: they are not; the message does not name the file.
    """
    names = {field.name for field in dataclasses.fields(LayerSpec)}
    for layer, fields in enumerate(layers):
        if not isinstance(fields, dict) or set(fields) != names:
            raise FileFormatError(f"the fields of layer {layer} are not {', '.join(sorted(names))}")
        for name, value in fields.items():
            absent = name == "sliding_window" and value is None
            if not absent and (not is_int(value) or value < 1):
                raise FileFormatError(f"{name} of layer {layer} is not a whole number of at least 1: {value!r:.100}")
    return tuple(LayerSpec(**fields) for fields in layers)

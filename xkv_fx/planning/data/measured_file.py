"""What the files of profiles and calibrations have in common: how it is said what is wrong with one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import safetensors

from xkv_fx.errors import BudgetError, FileFormatError
from xkv_fx.file_kinds import read_as


@contextmanager
def reading(path: str | os.PathLike[str], kind: str, again: str) -> Iterator[None]:
    """Whatever is wrong with a file's content is said with its name, and what to do.

    Args:
        kind: the format that it should have.
        again: how to get another one, such as "Profile again.".

    Raises:
        FileFormatError: a FileFormatError, BudgetError or SafetensorError was raised meanwhile.
        MissingFileError: there is no such file.
    """
    name = os.fspath(path)
    with read_as(path, kind):
        try:
            yield
        except safetensors.SafetensorError as error:
            raise FileFormatError(f"{name}: not a whole safetensors file ({error}); was it cut off? {again}") from error
        except (FileFormatError, BudgetError) as error:
            raise FileFormatError(f"{name}: {error!s:.1000}") from error

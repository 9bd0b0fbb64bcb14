"""The command line: the public calls under the same names."""

from __future__ import annotations

import sys

from xkv_fx.cli.common import app, errors
from xkv_fx.errors import XkvError

from xkv_fx.cli import planning, fitting, serving, chatting, measuring  # isort: skip  # noqa: F401  (registers the commands, in this order)

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line; an error of ours is one line and exit code 2."""
    try:
        app()
    except (XkvError, OSError) as error:
        missing = error.filename if isinstance(error, FileNotFoundError) else None
        said = str(error) if missing is None else f"there is no file {missing}"
        errors.print(f"error: {said}", style="red", markup=False, soft_wrap=True)
        sys.exit(2)

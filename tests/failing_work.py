"""Work for a process that does not end as it should; in a file that the process finds, whatever starts pytest."""

from __future__ import annotations

import os
import time
from typing import Any


def stall(entry: Any, sender: Any) -> None:
    time.sleep(60)


def crash(entry: Any, sender: Any) -> None:
    os._exit(3)

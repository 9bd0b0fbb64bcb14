"""One stage of a session, in a process of its own, whose arguments are its name, a folder, and the device."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import torch

from xkv_fx.errors import first_line
from xkv_fx.evaluation.speed.gpu_session.record import DONE, FAILED, Record
from xkv_fx.evaluation.speed.gpu_session.sizes import sizes_for
from xkv_fx.evaluation.speed.gpu_session.stages import STAGES


def run_stage(name: str, out: Path, device: str) -> Record:
    """Run a stage, and write down how it ended. What goes wrong in it is noted, and not raised."""
    record = Record(out, name)
    record.save()
    try:
        if device == "cuda" and not torch.cuda.is_available():
            record.end(FAILED, "not measured: there is no GPU that torch can use")
            return record
        STAGES[name](record, sizes_for(device), torch.device(device))
    except Exception as error:  # whatever it is, the next stage is to begin
        traceback.print_exc()
        record.end(FAILED, f"{type(error).__name__}: {first_line(error)}")
    else:
        record.end(DONE)
    return record


if __name__ == "__main__":
    run_stage(sys.argv[1], Path(sys.argv[2]), sys.argv[3])

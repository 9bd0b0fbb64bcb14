"""Other engines, each measured by a script of its own in the environment that it lives in."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import subprocess
import sys
from typing import Any

from xkv_fx.evaluation.speed.bench_result import Run

PEERS = {"kvpress": "kvpress_decode.py", "openvino": "openvino_decode.py"}
"""Name and script; the script takes what to measure as JSON, and prints its figures as the last line."""
MOST_SECONDS = 1800


@dataclasses.dataclass(frozen=True)
class PeerRequest:
    """What a script is asked to measure, as the JSON that it is given.

    Attributes:
        folder, gguf: where the model is; the name of a GGUF file in the folder, if it is one.
        context: tokens that every row has seen.
        rows: of the batch.
        kept: tokens that each layer keeps.
        new_tokens: how many tokens are decoded.
        dtype: torch's name of what the model computes in.
    """

    folder: str | None
    gguf: str | None
    context: int
    rows: int
    kept: int
    new_tokens: int
    dtype: str


def run_peer(name: str, python: str | None, request: PeerRequest) -> Run:
    """Measure another engine, or say why it was not.

    Args:
        python: the interpreter of the environment that it is installed in; None if there is no such environment.
    """
    skipped = Run(name, request.rows, request.context, skipped=f"not installed; give --{name}-python")
    if python is None:
        return skipped
    script = importlib.resources.files("xkv_fx.evaluation.speed").joinpath("peer_scripts", PEERS[name])
    try:
        done = subprocess.run(
            [python, "-c", script.read_text(encoding="utf-8"), json.dumps(dataclasses.asdict(request))],
            capture_output=True, text=True, timeout=MOST_SECONDS, check=True,
        )  # fmt: skip
        return _read(name, request, done.stdout)
    except OSError as error:
        return _skipped(skipped, f"not run: {error}")
    except subprocess.TimeoutExpired:
        return _skipped(skipped, f"not done after {MOST_SECONDS} s")
    except subprocess.CalledProcessError as error:
        print(error.stderr, file=sys.stderr)
        last = next(iter(reversed(str(error.stderr).strip().splitlines())), "no word")
        return _skipped(skipped, f"failed: {last}")
    except (ValueError, KeyError, TypeError) as error:
        return _skipped(skipped, f"its figures could not be read: {error}")


def _read(name: str, request: PeerRequest, printed: str) -> Run:
    figures: dict[str, Any] = json.loads(printed.strip().splitlines()[-1])
    return Run.of_steps(
        name,
        int(figures["rows"]),
        request.context,
        [float(seconds) for seconds in figures["steps_s"]],
        prefill_s=float(figures["prefill_s"]),
        kv_bytes=None if figures.get("kv_bytes") is None else int(figures["kv_bytes"]),
    )


def _skipped(run: Run, reason: str) -> Run:
    return Run(run.name, run.rows, run.context, skipped=reason)

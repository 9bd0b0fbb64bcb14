"""Other engines, each measured by a script of its own in the environment that it lives in."""

from __future__ import annotations

import importlib.resources
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from xkv_fx.evaluation.bench_result import Run

if TYPE_CHECKING:
    from xkv_fx.evaluation.bench import Settings

PEERS = {"kvpress": "kvpress_decode.py", "openvino": "openvino_decode.py"}
"""Name and script; the script takes what to measure as JSON, and prints its figures as the last line."""
MOST_SECONDS = 1800


def run_peer(name: str, settings: Settings, dtype: str) -> Run:
    """Measure another engine, or say why it was not."""
    python = settings.pythons.get(name)
    skipped = Run(name, settings.rows, settings.context, skipped=f"not installed; give --{name}-python")
    if python is None:
        return skipped
    request = {
        "folder": settings.folder,
        "gguf": settings.gguf,
        "context": settings.context,
        "rows": settings.rows,
        "kept": round(settings.budgets.total_tokens / len(settings.budgets.capacities)),
        "new_tokens": settings.rounds * settings.new_tokens,
        "dtype": dtype,
    }
    script = importlib.resources.files("xkv_fx.evaluation").joinpath("peer_scripts", PEERS[name])
    try:
        done = subprocess.run(
            [python, "-c", script.read_text(encoding="utf-8"), json.dumps(request)],
            capture_output=True, text=True, timeout=MOST_SECONDS, check=True,
        )  # fmt: skip
        return _read(name, settings, done.stdout)
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


def _read(name: str, settings: Settings, printed: str) -> Run:
    figures: dict[str, Any] = json.loads(printed.strip().splitlines()[-1])
    return Run.of_steps(
        name,
        int(figures["rows"]),
        settings.context,
        [float(seconds) for seconds in figures["steps_s"]],
        prefill_s=float(figures["prefill_s"]),
        kv_bytes=None if figures.get("kv_bytes") is None else int(figures["kv_bytes"]),
    )


def _skipped(run: Run, reason: str) -> Run:
    return Run(run.name, run.rows, run.context, skipped=reason)

"""A decode step as a CUDA graph, recorded once a session: one launch in place of hundreds.

What is recorded reads and writes a session's buffers where they lie, and a session never moves them. Its first step
runs as it is, which loads kernels and allocates workspaces; a recording may do neither. The second is recorded, which
runs and changes nothing, and then replayed. Every later step is replayed too.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from xkv_fx.errors import BackendError, first_line


@dataclasses.dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, Tensor]
    logits: Tensor

    def replay(self, ids: Tensor, position_ids: Tensor) -> Tensor:
        for own, given in zip(self.inputs, (ids, position_ids), strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.logits.clone()  # the next replay writes to the same place


class RecordedSteps:
    """Calls `run` as `(ids, position_ids, *state)` and returns its logits `[rows, 1, vocabulary]`, from a CUDA graph
    from the second call with a state on. Graphs are dropped with the states that they were recorded for.

    Raises:
        BackendError: the step cannot be recorded.
    """

    def __init__(self, run: Callable[..., Tensor]) -> None:
        self._run = run
        self._recorded = WeakTensorKeyDictionary()  # a state's first tensor -> its graph, None once it has run
        self._lock = threading.Lock()

    def __call__(self, ids: Tensor, position_ids: Tensor, *state: Tensor) -> Tensor:
        with self._lock:
            if state[0] not in self._recorded:
                self._recorded[state[0]] = None
                return self._run(ids, position_ids, *state)
            recorded: _Recorded | None = self._recorded[state[0]]
            if recorded is None:
                recorded = self._recorded[state[0]] = self._record(ids, position_ids, state)
        return recorded.replay(ids, position_ids)

    def _record(self, ids: Tensor, position_ids: Tensor, state: tuple[Tensor, ...]) -> _Recorded:
        inputs = (ids.clone(), position_ids.clone())
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                logits = self._run(*inputs, *state)
        except RuntimeError as error:
            raise BackendError(
                f"the decode step could not be recorded as a CUDA graph ({first_line(error)}); backend='eager' runs "
                "without"
            ) from error
        return _Recorded(graph, inputs, logits)

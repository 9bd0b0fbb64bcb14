"""Processes that measure prompts together, each its share, so that every one of them ends with all results."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import safetensors.numpy
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from xkv_fx import errors
from xkv_fx.capture.captured import CapturedModel
from xkv_fx.errors import BudgetError, XkvError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Progress = Callable[[int, int], None]
Arrays = Mapping[str, NDArray[Any]]
T = TypeVar("T")
_DONE, _FAILED = b"\0", b"\1"


@dataclasses.dataclass(frozen=True)
class Team:
    """The processes of a group, or this one alone.

    What they tell each other are tensors of bytes: results as safetensors, or an error's class and message.

    Attributes:
        group: of `torch.distributed`; None for this process alone.
        device: where tensors lie that the group exchanges.
    """

    group: ProcessGroup | None = None
    device: torch.device | str = "cpu"

    @property
    def size(self) -> int:
        """How many processes there are."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Which of them this one is."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def together(self, work: Callable[[], T]) -> T:
        """What `work` gives here, once it has ended in every process; an error in one of them is raised in all."""
        return self._share(work, lambda _: b"")[0]

    def check_same(self, given: Callable[[], Sequence[str | Tensor]]) -> None:
        """Refuse to go on with processes that were not given the same; `given` is not called in a process alone.

        Raises:
            BudgetError: one of them was given something else; raised in all of them.
        """
        if self.group is not None and len(set(self._share(given, _digest)[1])) > 1:
            raise BudgetError(
                "the processes of the group were not given the same model, weights, prompts and options; every one of "
                "them must make the same call, with all of the prompts, which they share among themselves"
            )

    def check_whole(self, captured: CapturedModel) -> None:
        """Refuse to share prompts among processes that share the model.

        Raises:
            BudgetError: they do.
        """
        if self.size > 1 and captured.shard.size > 1:
            raise BudgetError(
                f"this model is split among {captured.shard.size} processes, which run every prompt together; leave "
                "group out, and make the same call in each of them"
            )

    def measure(self, count: int, measure: Callable[[int], Arrays], progress: Progress | None = None) -> list[Arrays]:
        """`measure(prompt)` of each of `count` prompts, in their order, in every process.

        They go by rounds, in each of which every process measures one prompt: that of rank r the prompts r, r + size,
        r + 2 size, ... An error in one of them is raised in all, at the end of the round.

        Args:
            progress: called in the first process, as `progress(done, total)` for each prompt.
        """
        results: list[Arrays] = []

        def report(last: int) -> None:
            for done in range(last + 1, len(results) + 1):
                if progress is not None and self.rank == 0:
                    progress(done, count)

        def turn(first: int) -> Arrays:
            report(max(first - self.size, 0))
            return measure(first + self.rank) if first + self.rank < count else {}

        start = 0
        for start in range(0, count, self.size):
            own, told = self._share(lambda first=start: turn(first), _packed)  # type: ignore[misc]
            found = [own] if self.group is None else [safetensors.numpy.load(part) for part in told]
            results += found[: count - start]
        report(start)
        return results

    def _share(self, work: Callable[[], T], told: Callable[[T], bytes]) -> tuple[T, list[bytes]]:
        """What `work` gives here, and what each process tells of its own."""
        if self.group is None:
            return work(), []
        try:
            result = work()
            message = told(result)
        except Exception as error:  # whatever it is, the others wait for a message
            self._exchange(_FAILED + json.dumps([type(error).__name__, str(error)]).encode())
            raise
        everyones = self._exchange(_DONE + message)
        for rank, part in enumerate(everyones):
            if part.startswith(_FAILED):
                raise _error_of(rank, part[1:])
        return result, [part[1:] for part in everyones]

    def _exchange(self, message: bytes) -> list[bytes]:
        """Each process's message, by rank."""
        size = torch.tensor([len(message)], device=self.device)
        sizes = [torch.empty_like(size) for _ in range(self.size)]
        dist.all_gather(sizes, size, group=self.group)
        padded = message.ljust(max(int(other) for other in sizes), b"\0")
        own = torch.frombuffer(bytearray(padded), dtype=torch.uint8).to(self.device)
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own, group=self.group)
        return [part[: int(size)].cpu().numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]


ALONE = Team()


def team_of(group: ProcessGroup | None, model: Any) -> Team:
    """The processes of a group, each with a copy of a model.

    Raises:
        BudgetError: not a group of processes, or one that this process is not in.
    """
    if group is None:
        return Team()
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise BudgetError(
            "group must be a process group of torch.distributed that this process is in, such as "
            f"torch.distributed.group.WORLD once it is initialised; got {type(group).__name__}"
        )
    on_cpu = dist.get_backend(group) in (dist.Backend.GLOO, dist.Backend.MPI)
    return Team(group, "cpu" if on_cpu else getattr(model, "device", "cpu"))


def _digest(given: Sequence[str | Tensor]) -> bytes:
    digest = hashlib.sha256()
    for part in given:
        content = part.encode() if isinstance(part, str) else part.cpu().numpy().tobytes()
        digest.update(b"%d %b" % (len(content), content))
    return digest.digest()


def _packed(arrays: Arrays) -> bytes:
    return safetensors.numpy.save(dict(arrays))


def _error_of(rank: int, described: bytes) -> Exception:
    """The error of another process: of our class where it was ours."""
    name, message = json.loads(described)
    kind = getattr(errors, name, None)
    if not (isinstance(kind, type) and issubclass(kind, XkvError)):
        kind, message = XkvError, f"{name}: {message}"
    return kind(f"in process {rank}: {message}")

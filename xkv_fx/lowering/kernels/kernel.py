"""What a kernel is: an implementation of something that decode graphs do, and the check of what it can serve."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from torch.fx import Node

from xkv_fx.errors import PassError
from xkv_fx.passes.tools.graph import fake_value


@dataclasses.dataclass(frozen=True)
class Op:
    """Something that decode graphs do and kernels compete for.

    Attributes:
        name: for people and for `Choice`.
        read: the arguments of a node by name, or None for a node that does something else.
        counted: how calls are counted for people, with the fields `served` and `total`.
    """

    name: str
    read: Callable[[Node], Mapping[str, Any] | None]
    counted: str


@dataclasses.dataclass(frozen=True)
class Call:
    """A node of a decode graph that does what `op` says."""

    op: Op
    node: Node

    @property
    def given(self) -> dict[str, Any]:
        """Its arguments by name. They are read anew each time, since a kernel may have replaced the node that an
        argument was.

        Raises:
            PassError: the call itself was replaced.
        """
        found = self.op.read(self.node)
        if found is None:
            raise PassError(f"the node {self.node.name!r} is no call of {self.op.name} any more")
        return dict(found)

    @property
    def values(self) -> dict[str, Any]:
        """Its arguments by name, a fake tensor for each that is computed."""
        return {name: fake_value(argument) for name, argument in self.given.items()}

    @property
    def device(self) -> str:
        """The kind of device that it runs on, such as `"cpu"`."""
        kind: str = self.node.meta["val"].device.type
        return kind


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An implementation of an op, and the check beside it.

    Attributes:
        name: for people and for `Choice`.
        accepts: None for a call that it serves, or why it does not serve it, in a few words.
        use: puts it in the place of calls that it has accepted: of one call, or of all that belong together.
        device: the kind of device that it is for; None for any.
        together: calls with equal keys are handed to `use` at once. Each call alone when None.
    """

    op: Op
    name: str
    accepts: Callable[[Call], str | None]
    use: Callable[[Sequence[Call]], None]
    device: str | None = None
    together: Callable[[Call], Hashable] | None = None


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a kernel does not serve a call.

    Attributes:
        kernel: its name.
        elsewhere: it is for another kind of device, and was not asked.
    """

    kernel: str
    why: str
    elsewhere: bool = False


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which kernel serves a call.

    Attributes:
        op: the op's name.
        node: the name of the node in its graph.
        kernel: the name of the kernel.
        device: what that kernel is for; None for any device.
        refusals: of the kernels before it in the table.
    """

    op: str
    node: str
    kernel: str
    device: str | None
    refusals: tuple[Refusal, ...]

    def __str__(self) -> str:
        """The kernel, and why none before it serves. Kernels for other devices are mentioned only where there is none
        for this one."""
        asked = [refusal for refusal in self.refusals if not refusal.elsewhere]
        if not asked and self.device is None:
            asked = list(self.refusals)
        whys = "; ".join(f"{refusal.kernel}: {refusal.why}" for refusal in asked)
        return f"{self.kernel} ({whys})" if whys else self.kernel

"""What engines can be exported as, one row a target. Nothing here needs torch, so that commands can name them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from xkv_fx.errors import BackendError

if TYPE_CHECKING:
    from xkv_fx.runtime.state import GraphKind


@dataclasses.dataclass(frozen=True)
class Target:
    """What an engine is made of, and where it runs.

    Attributes:
        prompts, decode: the forms of the packages, by their names in `forms.PACKAGE_FORMS`.
        devices: kinds of device on which its engines run.
        summary: for the help of commands.
    """

    prompts: str
    decode: str
    devices: tuple[str, ...]
    summary: str

    def form_of(self, kind: GraphKind) -> str:
        """The form of the package of that kind."""
        return self.decode if kind == "decode" else self.prompts


TARGETS: Mapping[str, Target] = {
    "aoti": Target("aoti", "aoti", ("cpu", "cuda"), "compiled for this machine"),
    "pt2": Target("program", "program", ("cpu", "cuda"), "portable, with pickle"),
    "tensorrt": Target("aoti", "tensorrt", ("cuda",), "on a GPU, decode by TensorRT"),
}


def target_of(name: str) -> Target:
    """The target of that name.

    Raises:
        BackendError: there is none.
    """
    if name not in tuple(TARGETS):
        raise BackendError(f"unknown target {name!r}; choose one of {', '.join(TARGETS)}")
    return TARGETS[name]

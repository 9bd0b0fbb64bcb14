"""The exceptions of xkv_fx. Each message says what was wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class XkvError(Exception):
    """Base class of every error that xkv_fx raises on purpose."""


class BudgetError(XkvError, ValueError):
    """Capacities, a policy or a constraint that cannot be honoured."""


class FileFormatError(XkvError, ValueError):
    """A file that is not what it claims to be: damaged, cut off, of a newer format, or not ours."""


class MissingFileError(XkvError, FileNotFoundError):
    """A file that is to be read and is not there, or the missing folder of one that is to be written."""


class ModelMismatchError(XkvError, ValueError):
    """A plan, profile or session that was made for a different model or policy."""


class UnsupportedModelError(XkvError):
    """A model whose attention cannot be captured exactly; it is refused instead of being run wrongly."""


class PassError(XkvError):
    """A graph pass whose postcondition does not hold."""


class PromptError(XkvError, ValueError):
    """Input ids, a mask or a prompt length that the model or the plan cannot take."""


class CapacityError(XkvError):
    """More tokens than the KV cache was planned to hold, under a policy that may not evict."""


class SessionError(XkvError):
    """A session used with another model, batch size or history than its own."""


class BackendError(XkvError):
    """A lowering that is unknown, or that lacks what it needs on this machine."""


class EngineError(XkvError):
    """An engine's folder that does not fit this machine, this torch, or itself; or one that cannot be written."""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known one that is nearest to it, if one is near."""
    near = difflib.get_close_matches(str(name).lower(), list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def first_line(error: Exception) -> str:
    """The message of an error that is not ours, on one line, to be put into a message of ours."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

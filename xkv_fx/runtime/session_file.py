"""Keeping a session in a file, to go on with the conversation later. The file is safetensors and read as untrusted."""

from __future__ import annotations

import hashlib
import json
import os

import safetensors
import torch
from safetensors.torch import save_file

from xkv_fx.errors import FileFormatError, SessionError
from xkv_fx.fields import HEADER, TEXT, Fields, read_header, whole
from xkv_fx.files import check_safetensors_size, written_whole
from xkv_fx.runtime.session import Session
from xkv_fx.runtime.state import CachePlan, State

FORMAT = "xkv_fx.session"
FORMAT_VERSION = 2  # 1 had no checksum
_FIELDS: Fields = {"program": TEXT, "fed": whole(0), "sha256": TEXT}
_HEADER_ROOM = 1 << 20


def save_session(session: Session, path: str | os.PathLike[str]) -> None:
    """Write a session's tensors; the file appears whole or not at all."""
    names = session.program.plan.names()
    tensors = {name: tensor.contiguous() for name, tensor in zip(names, session.state.tensors, strict=True)}
    key, fed = session.program.key, session.history.fed
    digest = _digest(key, fed, session.state)
    header = {"format": FORMAT, "version": FORMAT_VERSION, "program": key, "fed": fed, "sha256": digest}
    with written_whole(path) as temporary:
        save_file(tensors, temporary, {HEADER: json.dumps(header)})


def load_session(session: Session, path: str | os.PathLike[str]) -> None:
    """Fill a session from a file that `save_session` wrote; the session is untouched unless the whole file is good.

    Raises:
        SessionError: a session of another model, budgets or batch size.
        FileFormatError: not a session file, damaged, cut off, or of a newer format.
    """
    plan = session.program.plan
    try:
        check_safetensors_size(path, plan.kv_bytes + plan.state_bytes + _HEADER_ROOM)
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            header = read_header(file.metadata(), FORMAT, FORMAT_VERSION, _FIELDS, oldest=2)
            if header["program"] != session.program.key:
                raise SessionError(
                    f"{os.fspath(path)}: a session of another model, other budgets or another batch size; transform "
                    "with those that it was saved with"
                )
            if set(file.keys()) != set(plan.names()):
                raise FileFormatError("its tensors are not those of a session")
            state = State(plan.states, tuple(file.get_tensor(name).to(plan.device) for name in plan.names()))
        _check_state(plan, state)
        if _digest(header["program"], header["fed"], state) != header["sha256"]:
            raise FileFormatError("its content does not match its checksum; it is damaged")
    except safetensors.SafetensorError as error:
        raise FileFormatError(f"{os.fspath(path)}: not a whole safetensors file ({error}); was it cut off?") from error
    except FileFormatError as error:
        raise FileFormatError(f"{os.fspath(path)}: {error!s:.1000}") from error
    session.restore(state, header["fed"])


def _digest(program: str, fed: int, state: State) -> str:
    """SHA-256 over everything that a session's file holds, in hexadecimal; it detects damage, not malice."""
    digest = hashlib.sha256(json.dumps([program, int(fed)]).encode())
    for tensor in state.tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_state(plan: CachePlan, state: State) -> None:
    """Shapes, dtypes, finite numbers, and what each state says about its own tensors."""
    for buffer, tensor in zip(plan.buffers, state.tensors, strict=True):
        if tuple(tensor.shape) != buffer.shape or tensor.dtype != buffer.dtype:
            raise FileFormatError(
                f"{buffer.name} is {tensor.dtype} of {list(tensor.shape)} instead of {buffer.dtype} of "
                f"{list(buffer.shape)}"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise FileFormatError(f"{buffer.name} holds numbers that are not finite")
    counts = state.of(plan.counters)
    for part in (plan.counters, *(other for other in plan.states if other is not plan.counters)):
        problem = part.problem(state.of(part), counts)
        if problem is not None:
            raise FileFormatError(problem)

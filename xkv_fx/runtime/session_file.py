"""Keeping a session in a file, to go on with the conversation later. The file is safetensors and read as untrusted."""

from __future__ import annotations

import hashlib
import json
import os
import sys

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from xkv_fx.errors import FileFormatError, SessionError
from xkv_fx.fields import HEADER, TEXT, Fields, read_header, whole
from xkv_fx.file_kinds import read_as
from xkv_fx.files import check_safetensors_size, written_whole
from xkv_fx.runtime.history import PADDING
from xkv_fx.runtime.session import Program, Session
from xkv_fx.runtime.state import CachePlan, State

FORMAT = "xkv_fx.session"
FORMAT_VERSION = 3  # 1 had no checksum; 2 lacked the ids that were fed, so a conversation could not be compared
_IDS = "fed_ids"
_FIELDS: Fields = {"program": TEXT, "fed": whole(0), "sha256": TEXT}
_HEADER_ROOM = 1 << 20


def save_session(session: Session, path: str | os.PathLike[str]) -> None:
    """Write a session's tensors; the file appears whole or not at all."""
    names = session.program.plan.names()
    tensors = {name: tensor.contiguous() for name, tensor in zip(names, session.state.tensors, strict=True)}
    key, fed, ids = session.program.key, session.history.fed, session.transcript.ids.contiguous()
    digest = _digest(key, fed, (*session.state.tensors, ids))
    header = {"format": FORMAT, "version": FORMAT_VERSION, "program": key, "fed": fed, "sha256": digest}
    with written_whole(path) as temporary:
        save_file({**tensors, _IDS: ids}, temporary, {HEADER: json.dumps(header)})


def load_session(session: Session, path: str | os.PathLike[str]) -> None:
    """Fill a session from a file that `save_session` wrote; the session is untouched unless the whole file is good.

    Raises:
        SessionError: a session of another model, budgets or batch size.
        FileFormatError: not a session file, damaged, cut off, or of a newer format.
        MissingFileError: no such file.
    """
    with read_as(path, FORMAT):
        session.restore(*_read(session.program, path))


def _read(program: Program, path: str | os.PathLike[str]) -> tuple[State, int, Tensor | None]:
    """The state, the columns fed and their ids, all checked."""
    plan = program.plan
    try:
        check_safetensors_size(path, sys.maxsize)
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            header = read_header(file.metadata(), FORMAT, FORMAT_VERSION, _FIELDS, oldest=2)
            if header["program"] != program.key:
                raise SessionError(
                    f"{os.fspath(path)}: a session of another model, other budgets or another batch size; transform "
                    "with those that it was saved with"
                )
            fed, with_ids = header["fed"], header["version"] > 2
            ids_bytes = plan.rows * fed * torch.int32.itemsize if with_ids else 0
            check_safetensors_size(path, plan.nbytes + ids_bytes + _HEADER_ROOM)
            if set(file.keys()) != {*plan.names(), *((_IDS,) if with_ids else ())}:
                raise FileFormatError("its tensors are not those of a session")
            state = State(plan.states, tuple(file.get_tensor(name).to(plan.device) for name in plan.names()))
            ids = file.get_tensor(_IDS).to(plan.device) if with_ids else None
        _check_state(plan, state)
        _check_ids(plan, state, fed, ids)
        if _digest(header["program"], fed, (*state.tensors, *(() if ids is None else (ids,)))) != header["sha256"]:
            raise FileFormatError("its content does not match its checksum; it is damaged")
    except safetensors.SafetensorError as error:
        raise FileFormatError(f"{os.fspath(path)}: not a whole safetensors file ({error}); was it cut off?") from error
    except FileFormatError as error:
        raise FileFormatError(f"{os.fspath(path)}: {error!s:.1000}") from error
    return state, fed, ids


def _digest(program: str, fed: int, tensors: tuple[Tensor, ...]) -> str:
    """SHA-256 over everything that a session's file holds, in hexadecimal; it detects damage, not malice."""
    digest = hashlib.sha256(json.dumps([program, int(fed)]).encode())
    for tensor in tensors:
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


def _check_ids(plan: CachePlan, state: State, fed: int, ids: Tensor | None) -> None:
    """At most as many columns as were fed; if all of them, then each row has as many tokens in them as it has seen."""
    if ids is None:
        return
    right_shape = ids.dim() == 2 and ids.shape[0] == plan.rows and ids.shape[1] <= fed
    if not right_shape or ids.dtype != torch.int32 or bool((ids < PADDING).any()):
        raise FileFormatError(f"{_IDS} is not int32 of {plan.rows} rows and at most {fed} columns, from {PADDING} on")
    tokens, seen = (ids != PADDING).sum(1), state.of(plan.counters)["seen"]
    if bool((tokens > seen).any() if ids.shape[1] < fed else (tokens != seen).any()):
        raise FileFormatError(f"{_IDS} contradicts the counters")

"""Pictures of what a session keeps."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from xkv_fx.errors import XkvError


def kept_share(session: Any, row: int = 0) -> Tensor:
    """Which tokens each layer keeps: float32 `[layers, tokens seen]`, the share of its KV heads that hold the token.

    Args:
        session: from `llm.new_session()`.
        row: of the batch.
    """
    tokens = int(session.tokens_seen[row])
    layers = len(session.session.program.plan.layers)
    shares = torch.zeros(layers, tokens)
    for layer in range(layers):
        kept = session.kept_positions(layer)[row]
        for head in kept:
            shares[layer, head[head >= 0]] += 1 / len(kept)
    return shares


def draw_kept(session: Any, path: str | os.PathLike[str], row: int = 0) -> None:
    """Write a picture, layers by positions: the darker, the more of a layer's KV heads keep that token.

    Args:
        session: from `llm.new_session()`, with tokens in it.
        path: where to; the ending decides the format (.png, .svg, .pdf).

    Raises:
        XkvError: matplotlib is missing, or the session is empty.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise XkvError("pictures need matplotlib; install xkv-fx[plots]") from error
    shares = kept_share(session, row)
    if shares.shape[1] == 0:
        raise XkvError("the session has seen no tokens yet; there is nothing to draw")
    figure = Figure(figsize=(10, 1.2 + 0.14 * len(shares)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares.numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set(
        xlabel="position of the token", ylabel="layer", title="Tokens kept, by the share of KV heads that keep them"
    )
    figure.savefig(path, dpi=120)

"""What the scaling, bias and mask of an attention that a model writes out come to.

It is found by running that part of the graph on given scores at several lengths. What is not a scale, a linear bias of
the distance, and causality (over all tokens or a sliding window) is refused.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from xkv_fx.errors import UnsupportedModelError
from xkv_fx.passes.tools.dependence import SHORT_LENGTHS, Evaluation, ValueFlow, size_at
from xkv_fx.passes.tools.graph import arguments
from xkv_fx.passes.tools.operators import CASTS

aten = torch.ops.aten
# Logits this far down get a weight of exactly 0.
MASKED = -1e4
PROBED = 40
LONGEST = 4096


@dataclasses.dataclass(frozen=True)
class WrittenAttention:
    """One attention as the model writes it.

    Attributes:
        output: the node that it ends in.
        q, k, v: `[rows, heads, S, head_dim]` or `[rows * heads, S, head_dim]`.
        chain: the nodes from the products of queries and keys to what the softmax is taken of; empty for
            `scaled_dot_product_attention`.
        keys_transposed: `k` has its last two dimensions exchanged.
        mask: of `scaled_dot_product_attention`.
        causal: its own flag.
        scale: its own factor.
    """

    output: Node
    q: Node
    k: Node
    v: Node
    chain: tuple[Node, ...] = ()
    keys_transposed: bool = False
    mask: Node | None = None
    causal: bool = False
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Reach:
    """What scaling, bias and mask of an attention come to.

    Attributes:
        scale: factor on the products.
        sliding_window: the newest tokens that a query sees, its own included; None for all.
        slopes: float32 `[query_heads]`, what a logit loses for each token of distance; None for nothing.
    """

    scale: float
    sliding_window: int | None = None
    slopes: Tensor | None = None


class Prover:
    """Finds out what masks and biases do, by running the part of the graph that makes them."""

    def __init__(
        self, module: GraphModule, flow: ValueFlow, ids: Node, positions: Node, rows: int, longest: int | None
    ) -> None:
        self.flow = flow
        self.module, self.ids, self.positions, self.rows = module, ids, positions, rows
        self.longest = longest
        self.tokens = flow.dependents([ids])
        self._at: dict[int, Evaluation] = {}

    def reach(self, written: WrittenAttention) -> Reach:
        """What an attention's queries see, and how.

        Raises:
            UnsupportedModelError: more than its past, less than a sliding window of it, or through anything else than
                a scale and a bias that is linear in the distance.
        """
        where = written.output.name
        if not written.chain and written.mask is None:
            if not written.causal:
                raise UnsupportedModelError(f"{where} attends to all tokens, not to the past alone")
            return Reach(written.scale)
        first, *others = [self._reach_at(written, length) for length in self._lengths(written)]
        windows = {reach.sliding_window for reach in others} - {None}  # not seen at lengths that are shorter
        if len(windows) > 1:
            raise UnsupportedModelError(f"the mask of {where} is no sliding window of one size")
        return dataclasses.replace(first, sliding_window=next(iter(windows), None))

    def _lengths(self, written: WrittenAttention) -> list[int]:
        """Lengths that show everything: beyond each number that positions are compared with, and each table's end."""
        made_from = {source for node in written.chain for source in node.all_input_nodes} | {written.mask}
        unaware = [node for node in made_from if node is not None and node not in self.tokens]
        lengths = set(SHORT_LENGTHS)
        limit = min(self.longest or LONGEST, LONGEST)
        for node in self.flow.behind(unaware):
            if node.op == "get_attr" and max(node.meta["val"].shape, default=0) > 1:
                lengths.add(limit)
            for number in _whole_numbers(node):
                if number > LONGEST and (self.longest is None or number < self.longest):
                    raise UnsupportedModelError(
                        f"{node.name}, in the mask of {written.output.name}, has the number {number}; masks are proven "
                        f"up to {LONGEST} tokens"
                    )
                lengths.add(number + 2)
        return [min(PROBED, limit), *sorted({min(length, limit) for length in lengths})]

    def _reach_at(self, written: WrittenAttention, length: int) -> Reach:
        where = written.output.name
        logits = self._logits(written, length, 0.0)
        seen = logits > MASKED
        window = _window(seen, where)
        scale = self._scale(written, logits, seen) if length <= PROBED else written.scale
        queries = slice(None) if length <= PROBED else slice(-1, None)  # the last one has every distance
        position = torch.arange(length)
        distance = (position[queries, None] - position[None]).double()
        seen, own = seen[:, :, queries], logits.diagonal(dim1=2, dim2=3)[:, :, queries, None]
        bias = (logits[:, :, queries] - own).double()
        farthest = min(length, window or length) - 1
        slopes = -bias[0, :, -1, length - 1 - farthest] / max(farthest, 1)
        error = (bias + slopes[None, :, None, None] * distance)[seen].abs()
        size = float(logits[:, :, queries][seen].abs().max())
        if bool((error > 8 * torch.finfo(written.output.meta["val"].dtype).eps * max(1.0, size)).any()):
            raise UnsupportedModelError(f"the bias of {where} is not linear in the distance of two tokens")
        return Reach(scale, window, slopes.float() if bool((slopes.abs() > 1e-6).any()) else None)

    def _scale(self, written: WrittenAttention, unscored: Tensor, seen: Tensor) -> float:
        """The number that scores are multiplied by, given the logits for scores of 0."""
        if not written.chain:
            return written.scale
        where, length = written.output.name, unscored.shape[-1]
        scale = float((self._logits(written, length, 1.0) - unscored)[seen].median())
        noise = torch.randn(self._scores_shape(written, length), generator=torch.Generator().manual_seed(length))
        got = self._logits(written, length, noise.double())
        expected = scale * noise.double().view(got.shape) + unscored
        if not torch.allclose(got[seen], expected[seen], rtol=1e-4, atol=1e-4 * max(1.0, abs(scale))):
            raise UnsupportedModelError(f"the logits of {where} are not its scores times a number plus a bias")
        if bool((got[~seen] > MASKED).any()):
            raise UnsupportedModelError(f"the mask of {where} lets some scores through")
        return scale

    def _scores_shape(self, written: WrittenAttention, length: int) -> tuple[int, ...]:
        return size_at(written.chain[0], length)

    def _logits(self, written: WrittenAttention, length: int, scores: float | Tensor) -> Tensor:
        """What the softmax is taken of, `[rows, query_heads, length, length]`, for given scores."""
        dtype = torch.float64 if length <= PROBED else torch.float32
        known = self._evaluation(length)
        if not written.chain:
            mask = known.value(written.mask)  # type: ignore[arg-type]
            if mask.dtype == torch.bool:
                mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask.cpu(), float("-inf"))
            heads = size_at(written.q, length)[1]
            mask = mask.to(dtype).cpu()
            mask = mask.view((1,) * (4 - mask.dim()) + mask.shape)
            if written.causal:
                mask = mask + torch.full((length, length), float("-inf"), dtype=dtype).triu(1)
            whole: Tensor = mask.expand(self.rows, heads, length, length)
            return whole
        products = written.chain[0]
        shape = self._scores_shape(written, length)
        value: Any = torch.full(shape, scores, dtype=dtype) if isinstance(scores, float) else scores
        value = value.to(self.positions.meta["val"].device)
        if products.target is aten.baddbmm.default:
            given = arguments(products)
            value = given["beta"] * known.value(given["self"]).to(dtype) + given["alpha"] * value
        for before, node in itertools.pairwise(written.chain):
            if node.target not in CASTS:
                value = known.run(node, {before: value})
        logits: Tensor = value.to(dtype).cpu().reshape(self.rows, -1, length, length)
        return logits

    def _evaluation(self, length: int) -> Evaluation:
        if length not in self._at:
            device = self.positions.meta["val"].device
            positions = torch.arange(length, device=device).expand(self.rows, -1).contiguous()
            self._at[length] = Evaluation(
                self.module, {self.ids: torch.zeros_like(positions), self.positions: positions}
            )
        return self._at[length]


def _window(seen: Tensor, where: str) -> int | None:
    """The sliding window of a mask `[rows, heads, S, S]`, None if every query sees all of its past."""
    length = seen.shape[-1]
    if bool((seen != seen[:1, :1]).any()):
        raise UnsupportedModelError(f"the mask of {where} differs between rows or heads")
    mask = seen[0, 0]
    position = torch.arange(length)
    distance = position[:, None] - position[None]
    if bool(mask[distance < 0].any()):
        raise UnsupportedModelError(f"{where} attends to tokens that come later; only causal attention has a KV cache")
    window = int(mask[-1].sum())
    if not torch.equal(mask, (distance >= 0) & (distance < window)):
        raise UnsupportedModelError(f"the mask of {where} is neither causal nor a sliding window")
    return None if window == length else window


def _whole_numbers(node: Node) -> list[int]:
    """The numbers that a node compares positions with, or adds to them."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.is_floating_point():
        return []
    return [
        abs(arg) for arg in node.args if isinstance(arg, int) and not isinstance(arg, bool) and 1 < abs(arg) < 2**31
    ]

"""What a scorer may look at while one layer prefills: the new tokens, and what the layer held before them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from xkv_fx.errors import BudgetError
from xkv_fx.runtime.attention import apply_sink_logits, distance_bias, group_logits
from xkv_fx.runtime.coded import Stored, logits_of
from xkv_fx.runtime.form import AttentionForm
from xkv_fx.runtime.slots import EMPTY


@dataclasses.dataclass(frozen=True)
class PromptView:
    """The candidates of one layer: first the slots of the cache (none in a fresh prefill), then the S new tokens.

    Attributes:
        q: `[rows, query_heads, S, key_dim]`, rotated.
        k: new keys `[rows, kv_heads, S, key_dim]`, rotated.
        v: new values `[rows, kv_heads, S, value_dim]`; None for a scorer that does not read them.
        length: int64 `[rows]`, valid new tokens; they come first.
        form: of the layer's attention; its fields are properties here too.
        seen: int64 `[rows]`, tokens seen before these.
        old_k, old_v: what the slots hold, `[rows, kv_heads, slots, ...]`, or as it is stored in fewer bits; None in a
            fresh prefill.
        old_ordinals: int64 `[rows, kv_heads, slots]`, -1 for a free slot; None in a fresh prefill.
        unrotated: `[rows, query_heads, S, dim]`, the queries before their positions rotated them; None for a scorer
            that does not need them.
        old_scores: float32 `[rows, kv_heads, slots]`, what the slots' tokens were scored when they were chosen, 0 for
            those that came since; None where scores are not kept.
        rotation: `[rows, dim, key_dim]`, or `[rows, query_heads, dim, key_dim]` where heads differ (queries of an MLA
            latent), what queries are multiplied by from the right to rotate them: the mean over each row's next
            positions. None where positions do not rotate the queries.
        heads: which of the layer's KV heads these are; None for all of them.
    """

    q: Tensor
    k: Tensor
    v: Tensor | None
    length: Tensor
    form: AttentionForm
    seen: Tensor
    old_k: Tensor | Stored | None = None
    old_v: Tensor | Stored | None = None
    old_ordinals: Tensor | None = None
    unrotated: Tensor | None = None
    rotation: Tensor | None = None
    old_scores: Tensor | None = None
    heads: tuple[int, ...] | None = None

    @property
    def scale(self) -> float:
        """Factor on the products of queries and keys."""
        return self.form.scale

    @property
    def sliding_window(self) -> int | None:
        """The newest tokens that a query sees; None for all."""
        return self.form.sliding_window

    @property
    def softcap(self) -> float | None:
        """Bound on the logits' size; None for no bound."""
        return self.form.softcap

    @property
    def sink_logits(self) -> Tensor | None:
        """`[query_heads]`, one more logit a head in the softmax's denominator; None for none."""
        logits: Tensor | None = self.form.sink_logits
        return logits

    @property
    def slopes(self) -> Tensor | None:
        """`[query_heads]`, what a logit loses for each token of distance; None for nothing."""
        slopes: Tensor | None = self.form.slopes
        return slopes

    @functools.cached_property
    def ordinals(self) -> Tensor:
        """int64 `[rows, kv_heads, N]`: the ordinal of every candidate, -1 where there is none."""
        new = torch.arange(self.k.shape[2], device=self.k.device)
        arrived = torch.where(new < self.length[:, None], self.seen[:, None] + new, EMPTY)
        arrived = arrived[:, None].expand(-1, self.k.shape[1], -1)
        return arrived if self.old_ordinals is None else torch.cat((self.old_ordinals, arrived), 2)

    @functools.cached_property
    def there(self) -> Tensor:
        """bool `[rows, kv_heads, N]`: False for a free slot and for padding."""
        return self.ordinals != EMPTY

    @functools.cached_property
    def keys(self) -> Tensor:
        """`[rows, kv_heads, N, key_dim]`; where no candidate is there, anything. What slots hold in fewer bits is
        widened as a whole: `of_keys` does without."""
        return _whole(self.old_k, self.k)

    @functools.cached_property
    def values(self) -> Tensor:
        """`[rows, kv_heads, N, value_dim]`, as `keys`; `of_values` does without.

        Raises:
            BudgetError: the scorer's class does not say that it reads values.
        """
        return _whole(self.old_v, self._new_values)

    def of_keys(self, measure: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """A number for each candidate by its key, where slots of fewer bits are widened some at a time.

        Args:
            measure: takes some candidates' keys float32 `[rows, kv_heads, M, key_dim]`, and bool `[rows, kv_heads, M]`,
                False where no candidate is there; returns `[..., M]`.

        Returns:
            what `measure` does, `[..., N]`.
        """
        return self._of(measure, self.old_k, self.k)

    def of_values(self, measure: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """As `of_keys`, by the values.

        Raises:
            BudgetError: the scorer's class does not say that it reads values.
        """
        return self._of(measure, self.old_v, self._new_values)

    def _of(self, measure: Callable[[Tensor, Tensor], Tensor], held: Tensor | Stored | None, new: Tensor) -> Tensor:
        slots = self.there.shape[2] - new.shape[2]
        parts = [
            measure(piece.float(), self.there[:, :, slots:] if part is None else self.there[:, :, part])
            for part, piece in _pieces(held, new)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    @property
    def _new_values(self) -> Tensor:
        if self.v is None:
            raise BudgetError("this scorer was not given the values; set reads_values = True on its class")
        return self.v

    @property
    def unrotated_queries(self) -> Tensor:
        """`[rows, query_heads, S, dim]`, the queries before their positions rotated them.

        Raises:
            BudgetError: the scorer's class does not say that it needs them.
        """
        if self.unrotated is None:
            raise BudgetError(
                "this scorer was not given the queries before rotation; set needs_unrotated_queries = True on its class"
            )
        return self.unrotated

    def attention_of_last(self, count: int) -> Tensor:
        """Attention probabilities of the newest `count` valid queries.

        Returns:
            float32 `[rows, kv_heads, group, count, N]`, 0 for queries that do not exist and keys out of reach.
        """
        which = self.length[:, None] - count + torch.arange(count, device=self.q.device)
        index = which.clamp(min=0)[:, None, :, None].expand(-1, self.q.shape[1], -1, self.q.shape[3])
        return self._attention(self.q.gather(2, index), which, self.k.shape[2])

    def attention_of_block(self, start: int, stop: int) -> Tensor:
        """Attention probabilities of the new queries from `start` to before `stop`, which reach no later token.

        Returns:
            float32 `[rows, kv_heads, group, stop - start, N - S + stop]`: the slots and the first `stop` new tokens; 0
            for queries that are padding and keys out of reach.
        """
        which = torch.arange(start, stop, device=self.q.device).expand(self.q.shape[0], -1)
        return self._attention(self.q[:, :, start:stop], which, stop)

    def largest_attention_from(self, columns: Tensor, exists: Tensor, reach: int) -> Tensor:
        """The largest attention probability that queries behind the new tokens give to each candidate, over the slots
        and all columns up to each query; sliding windows are left out of account.

        The largest logit behind its log-sum-exp is looked for, so that only one number a candidate meets the
        exponential once more.

        Args:
            columns: int64 `[rows, count]`, where each row's queries stand.
            exists: bool `[rows, count]`, False for one that is padding.
            reach: no query stands at this column or behind it.

        Returns:
            float32 `[rows, kv_heads, N]`; 0 where no query exists, and for all columns that are no new tokens, which
            have their share of a query's attention, though.
        """
        last, kv_heads = self.q.shape[2] - 1, self.k.shape[1]
        index = columns.clamp(max=last)[:, None, :, None].expand(-1, self.q.shape[1], -1, self.q.shape[3])
        queries = self.q.gather(2, index)
        logits = group_logits(queries, self.k[:, :, :reach], self.scale, self.softcap)
        column = torch.arange(reach, device=self.q.device)
        key = (self.seen[:, None] + column)[:, None].expand(-1, kv_heads, -1)
        reached = (column <= columns[:, :, None])[:, None].expand(-1, kv_heads, -1, -1)
        if self.old_k is not None and self.old_ordinals is not None:
            logits = torch.cat((self._logits_of_slots(queries, self.old_k), logits), -1)
            key = torch.cat((self.old_ordinals, key), 2)
            held = (self.old_ordinals != EMPTY)[:, :, None].expand(-1, -1, columns.shape[1], -1)
            reached = torch.cat((held, reached), 3)
        if self.slopes is not None:
            query = (self.seen[:, None] + columns)[:, None, :, None]
            logits = logits + distance_bias(self.slopes, query - key[:, :, None]).view(*logits.shape)
        logits = logits.masked_fill(~reached[:, :, None], float("-inf"))
        lse = torch.logsumexp(logits, -1)
        if self.sink_logits is not None:
            lse = torch.logaddexp(lse, self.sink_logits.to(lse.dtype).view(kv_heads, -1, 1))
        lse = lse.masked_fill(~exists[:, None, None], float("inf"))
        largest = torch.exp((logits - lse[..., None]).amax((2, 3))).float()
        beyond = self.ordinals.shape[2] - largest.shape[2]
        return torch.nn.functional.pad(largest, (0, beyond)) * self.there

    def with_kept_scores(self, scores: Tensor) -> Tensor:
        """The larger one of each slot's score and the one that it was kept by."""
        if self.old_scores is None:
            return scores
        slots = self.old_scores.shape[2]
        return torch.cat((torch.maximum(scores[:, :, :slots], self.old_scores), scores[:, :, slots:]), 2)

    def _attention(self, queries: Tensor, which: Tensor, new: int) -> Tensor:
        """Attention of `queries` over the slots and the first `new` new tokens; row r's query i is its new token
        `which[r, i]`, where there is one."""
        logits = group_logits(queries, self.k[:, :, :new], self.scale, self.softcap)
        if self.old_k is not None:
            logits = torch.cat((self._logits_of_slots(queries, self.old_k), logits), -1)

        query = (self.seen[:, None] + which)[:, None, :, None]
        key = self.ordinals[:, :, None, : logits.shape[-1]]
        if self.slopes is not None:
            logits = logits + distance_bias(self.slopes, query - key).view(*logits.shape)
        exists = (which >= 0) & (which < self.length[:, None])
        reach = (key != EMPTY) & (key <= query) & exists[:, None, :, None]
        if self.sliding_window is not None:
            reach = reach & (key > query - self.sliding_window)
        return self.weights_of(logits, reach)

    def _logits_of_slots(self, queries: Tensor, held: Tensor | Stored) -> Tensor:
        if isinstance(held, Stored):
            return logits_of(queries, held, self.scale, self.softcap)
        return group_logits(queries, held, self.scale, self.softcap)

    def weights_of(self, logits: Tensor, reach: Tensor) -> Tensor:
        """The softmax of logits over the keys that are reached, sink logits counted.

        Args:
            logits: `[rows, kv_heads, group, count, keys]`.
            reach: bool `[rows, kv_heads, count, keys]`.

        Returns:
            float32 like `logits`, 0 where nothing is reached.
        """
        logits = logits.masked_fill(~reach[:, :, None], float("-inf"))  # an in-place op could not be traced in a loop
        lse = torch.logsumexp(logits, -1)
        weights = torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
        flat = apply_sink_logits(weights.flatten(1, 2), lse.flatten(1, 2), self.sink_logits)
        return flat.view(weights.shape).float()  # scores are float32 whatever the model computes in

    def in_order(self, values: Tensor) -> Tensor:
        """`values` `[rows, kv_heads, N]` with the candidates oldest first; free slots and padding come last."""
        return values if self.old_ordinals is None else values.gather(2, self._order)

    def back(self, values: Tensor) -> Tensor:
        """The inverse of `in_order`."""
        return values if self.old_ordinals is None else torch.zeros_like(values).scatter(2, self._order, values)

    @functools.cached_property
    def _order(self) -> Tensor:
        last = torch.iinfo(torch.int64).max
        return torch.argsort(torch.where(self.ordinals == EMPTY, last, self.ordinals), dim=2, stable=True)


def _whole(held: Tensor | Stored | None, new: Tensor) -> Tensor:
    """What slots hold and what is new, all at once."""
    if held is None:
        return new
    return torch.cat((held.vectors().to(new.dtype) if isinstance(held, Stored) else held, new), 2)


def _pieces(held: Tensor | Stored | None, new: Tensor) -> Iterator[tuple[slice | None, Tensor]]:
    """What slots hold, some of them at a time where it is stored in fewer bits; then what is new, with None for its
    place."""
    if isinstance(held, Stored):
        yield from held.vector_tiles()
    elif held is not None:
        yield slice(0, held.shape[2]), held
    yield None, new

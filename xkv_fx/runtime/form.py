"""What an attention does to its logits, besides multiplying queries and keys."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
    """What an indexer picks the keys of each query by (DeepSeek-V3.2, arXiv 2512.02556, section 2.1): a query reaches
    the `top_k` keys of the highest `sum_h weights[h] * relu(queries[h] . keys)`, those that tie with the last included.

    Attributes:
        queries: `[rows, index_heads, S, index_dim]`.
        keys: `[rows, 1, S, index_dim]`, the same for all KV heads; what is kept of them belongs to a slot.
        weights: float32 `[rows, S, index_heads]`, the scale of the products included.
        top_k: how many keys a query reaches.
    """

    queries: Any
    keys: Any
    weights: Any
    top_k: int

    @classmethod
    def of(cls, queries: Any, keys: Any, weights: Any, top_k: int | None) -> Index | None:
        """From an op's arguments, all of them or none."""
        return None if top_k is None else cls(queries, keys, weights, top_k)


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionForm:
    """How one attention turns the products of queries and keys into its weights.

    It travels whole from capture to the kernels and is flattened only where an op is called. While a graph is built,
    `sink_logits` and `slopes` are nodes of it; when it runs, they are tensors.

    Attributes:
        scale: factor on the products.
        sliding_window: attend to the newest so many tokens only, the query's own included; None for all.
        softcap: bound on the logits' size, by a scaled tanh (Gemma 2); None for no bound.
        sink_logits: `[query_heads]`, one more logit a head in the softmax's denominator (gpt-oss); None for none. Not
            to be confused with sink tokens, the first tokens of a row, which a policy may keep.
        slopes: `[query_heads]`, what a logit loses for each token between query and key (ALiBi, arXiv 2108.12409);
            None for nothing.
        index: which keys a query reaches; None for all.
    """

    scale: float
    sliding_window: int | None = None
    softcap: float | None = None
    sink_logits: Any = None
    slopes: Any = None
    index: Index | None = None

    @property
    def plain(self) -> bool:
        """Whether logits are the scaled products themselves, and every key that is not masked is reached."""
        return self.softcap is None and self.slopes is None and self.index is None

    @property
    def index_arguments(self) -> tuple[Any, ...]:
        """What `xkv::attention` takes behind its other arguments: nothing, or what `Index` has."""
        index = self.index
        return () if index is None else (index.queries, index.keys, index.weights, index.top_k)

    def within(self, sliding_window: int | None) -> AttentionForm:
        """The same under another sliding window."""
        return dataclasses.replace(self, sliding_window=sliding_window)

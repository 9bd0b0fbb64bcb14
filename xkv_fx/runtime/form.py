"""What an attention does to its logits, besides multiplying queries and keys."""

from __future__ import annotations

import dataclasses
from typing import Any


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
    """

    scale: float
    sliding_window: int | None = None
    softcap: float | None = None
    sink_logits: Any = None
    slopes: Any = None

    @property
    def plain(self) -> bool:
        """Whether logits are the scaled products themselves."""
        return self.softcap is None and self.slopes is None

    def within(self, sliding_window: int | None) -> AttentionForm:
        """The same under another sliding window."""
        return dataclasses.replace(self, sliding_window=sliding_window)

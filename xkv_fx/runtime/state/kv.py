"""Keys and values of one layer in the model's dtype, in as many slots as were planned."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from xkv_fx.errors import CapacityError
from xkv_fx.formats import LayerFormats
from xkv_fx.heads import HeadGroup, heads_in_words
from xkv_fx.layers import LayerSpec
from xkv_fx.runtime.attention import distance_bias
from xkv_fx.runtime.scorers import rescore_tokens, score_tokens, scoring_call
from xkv_fx.runtime.selection import choosing_call
from xkv_fx.runtime.slots import SlotPlan
from xkv_fx.runtime.state.base import Attention, Buffer, Build, LayerState, Value

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class CacheOps:
    """The ops that graphs call on a kind of cache, by their names in the namespace `xkv`. Code that builds graphs has
    registered them; a session or an engine works without them."""

    decode: str
    decode_scored: str
    extend: str
    keep: str

    def __getitem__(self, use: str) -> Any:
        """The op for one of these uses."""
        return getattr(torch.ops.xkv, getattr(self, use)).default


@dataclasses.dataclass(frozen=True)
class KVState(LayerState):
    """`k` and `v`, `[rows, kv_heads, slots, ...]`; `positions`, the ordinal that each slot held when it was last
    written by prefill (under `"scored"` by decode too); and `scores`, under `"scored"` the attention of each slot, with
    `keeps_scores` what it was kept by.

    Attributes:
        index: place among all caches.
        spec: what a slot holds.
        slots: how the slots are used.
        rows: batch rows.
        dtype: of keys and values.
        group: which KV heads of which layer it is for, where layers are planned by head; None where the caches are
            those of layers.
        keeps_scores: whether what survivors were chosen by stays with them, for a scorer that reads prompts again.
    """

    kind: ClassVar[str] = "keys and values"
    index: int
    spec: LayerSpec
    slots: SlotPlan
    rows: int
    dtype: torch.dtype
    group: HeadGroup | None = None
    keeps_scores: bool = dataclasses.field(default=False, kw_only=True)

    ops: ClassVar[CacheOps] = CacheOps("decode_attention", "decode_scored", "extend_attention", "keep")
    rescore: ClassVar[Any] = staticmethod(rescore_tokens)

    @classmethod
    def serves(cls, spec: LayerSpec, formats: LayerFormats | None) -> bool:
        """Whether it is the kind of state for such a layer in these formats."""
        return formats is None

    @functools.cached_property
    def buffers(self) -> tuple[Buffer, ...]:
        kept = [*self._stored, *self._beside, self._buffer("positions", self._shape, torch.int32, reset="count")]
        if self.slots.eviction == "scored" or self.keeps_scores:
            kept.append(self._buffer("scores", self._shape, torch.float32))
        return tuple(kept)

    @property
    def _shape(self) -> tuple[int, int, int]:
        return (self.rows, self.spec.kv_heads, self.slots.slots)

    @property
    def _stored(self) -> list[Buffer]:
        """The buffers of keys and values, in the order in which ops take them."""
        return [
            self._buffer("k", (*self._shape, self.spec.key_dim), self.dtype, holds="kv", reset="stale"),
            self._buffer("v", (*self._shape, self.spec.value_dim), self.dtype, holds="kv", reset="stale"),
        ]

    @property
    def _beside(self) -> list[Buffer]:
        """What else is kept, evicted and counted with each slot."""
        return []

    @property
    def _numbers(self) -> dict[str, Any]:
        """What ops must be told of how keys and values are stored."""
        return {}

    def _kv(self, build: Build) -> list[Value]:
        held = build.held(self)
        return [held[buffer.field] for buffer in self._stored]

    def _buffer(self, field: str, shape: tuple[int, ...], dtype: torch.dtype, **options: str) -> Buffer:
        return Buffer(f"{field}_{self.index}", field, shape, dtype, **options)  # type: ignore[arg-type]

    @property
    def layer(self) -> int:
        """Place of its layer among those that own a cache."""
        return self.index if self.group is None else self.group.layer

    @property
    def heads(self) -> tuple[int, ...]:
        """Which of its layer's KV heads it is for."""
        return tuple(range(self.spec.kv_heads)) if self.group is None else self.group.heads

    @property
    def where(self) -> str:
        """Whose cache it is, in words."""
        return f"layer {self.layer}" if self.group is None else f"layer {self.layer}, {heads_in_words(self.heads)}"

    @property
    def contents(self) -> str:
        """What a slot holds, in elements, for people."""
        return f"{self.spec.kv_heads} x ({self.spec.key_dim} + {self.spec.value_dim})"

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(buffer.nbytes for buffer in self.buffers if buffer.holds == "kv")

    def ordinals(self, held: Mapping[str, Tensor], counts: Mapping[str, Tensor]) -> Tensor:
        """Which tokens the slots hold now: int64 `[rows, kv_heads, slots]`, -1 for a free one.

        Args:
            held, counts: this state's tensors and those of the counters, by field.
        """
        return self.slots.ordinals(held["positions"], counts["seen"], counts["base"])

    # What graphs do to it

    def prefill(self, build: Build, attention: Attention) -> None:
        """The prompt's tokens are scored and the survivors written; what the buffers held is forgotten."""
        form = attention.form
        score = scoring_call(
            score_tokens, build.scorer, sliding_window=form.sliding_window, softcap=form.softcap, heads=self._some_heads
        )
        scores = build.emit(
            score, attention.q, attention.k, attention.v if build.scorer.reads_values else None, build.length, None,
            form.scale, sink_logits=form.sink_logits, slopes=form.slopes, **build.scorer_inputs(attention),
            name=f"scores_{attention.index}",
        )  # fmt: skip
        self._keep(build, attention, scores, fresh=True)

    def extend(self, build: Build, attention: Attention) -> Value:
        held, counts, form = build.held(self), _counts(build), attention.form
        given = (held["positions"], counts["seen"], counts["base"])
        if self.slots.sliding_window is None:
            mask = build.once(("extend mask", self.slots), lambda: build.inline(self._open_mask, *given))
        else:
            mask = build.inline(self._window_mask, *given, attention.q)
        return build.emit(
            self.ops["extend"], attention.q, attention.k, attention.v, *self._kv(build), mask, form.scale,
            **self._numbers, softcap=form.softcap, sink_logits=form.sink_logits, **self._reach(build, attention, given),
            **build.constants(self), name=f"attention_{attention.index}",
        )  # fmt: skip

    def _reach(self, build: Build, attention: Attention, given: Sequence[Value]) -> dict[str, Any]:
        """What else the op of `extend` must know to tell which tokens a query reaches, and how far away they are."""
        form = attention.form
        ages = None if form.slopes is None else build.inline(self.slots.extend_ages, *given)
        return {"sliding_window": form.sliding_window, "slopes": form.slopes, "ages": ages}

    def keep(self, build: Build, attention: Attention) -> None:
        """Survivors are chosen again among the slots and the new tokens. A row without new tokens keeps its state."""
        held, counts, form = build.held(self), _counts(build), attention.form
        score = scoring_call(
            self.rescore, build.scorer, self.slots.slots, plan=self.slots, sliding_window=form.sliding_window,
            softcap=form.softcap, heads=self._some_heads, **self._numbers,
        )  # fmt: skip
        kept = {"held_scores": held["scores"]} if self.keeps_scores else {}
        scores = build.emit(
            score, attention.q, attention.k, attention.v, build.length, counts["seen"], counts["base"],
            *self._kv(build), held["positions"], form.scale, sink_logits=form.sink_logits, slopes=form.slopes,
            **kept, **build.scorer_inputs(attention), **build.constants(self), name=f"scores_{attention.index}",
        )  # fmt: skip
        self._keep(build, attention, scores, fresh=False)

    @property
    def _some_heads(self) -> tuple[int, ...] | None:
        """Which of the layer's KV heads these are, None for all of them."""
        return None if self.group is None else self.group.heads

    def _keep(self, build: Build, attention: Attention, scores: Value, fresh: bool) -> None:
        held, counts = build.held(self), _counts(build)
        choose = choosing_call(self.slots, fresh)
        chosen = build.emit(choose, scores, held["positions"], build.length, counts["seen"], counts["base"])
        source, placed, gained = (build.emit(operator.getitem, chosen, part) for part in range(3))
        build.emit(
            self.ops["keep"], attention.k, attention.v, source, placed, *self._kv(build), held["positions"],
            capacity=self.slots.capacity, **self._numbers, fresh=fresh, **build.constants(self),
        )  # fmt: skip
        self._keep_beside(build, attention, source, fresh)
        if "scores" not in held:
            return
        if not fresh:
            gained = build.inline(_of_rows_with_tokens, gained, held["scores"], build.length)
        build.emit(aten.copy_.default, held["scores"], gained)

    def _keep_beside(self, build: Build, attention: Attention, source: Value, fresh: bool) -> None:
        """Bring what is kept beside keys and values to the survivors' slots, as `xkv::keep` does with these."""
        return None

    def decode(self, build: Build, attention: Attention) -> Value:
        """The token takes a slot, and every valid slot is attended to. Layers of equal plans share slot and mask where
        these follow from counters alone."""
        held, counts, form = build.held(self), _counts(build), attention.form
        given = (held["positions"], counts["seen"], counts["base"])
        token = (attention.q, attention.k, attention.v, *self._kv(build))
        options = {"softcap": form.softcap, "sink_logits": form.sink_logits, "name": f"attention_{attention.index}"}
        options |= {**self._numbers, **build.constants(self)}
        if self.slots.eviction != "scored":
            slot = build.once(("slot", self.slots), lambda: self._next_slot(build))
            mask = self._picked(build, attention, slot, self._mask(build, form.slopes, given))
            return build.emit(self.ops["decode"], *token, slot, mask, form.scale, **options)
        slot = build.inline(self.slots.evicted_slot, held["positions"], held["scores"], counts["seen"])
        if self.slots.masks_by_position or form.slopes is not None:
            after = build.inline(self.slots.with_token, held["positions"], slot, counts["seen"])
            given = (after, *given[1:])
        mask = self._picked(build, attention, slot, self._mask(build, form.slopes, given))
        return build.emit(
            self.ops["decode_scored"], *token, held["positions"], held["scores"], slot, mask, counts["seen"],
            form.scale, **options,
        )  # fmt: skip

    def _picked(self, build: Build, attention: Attention, slot: Value, mask: Value) -> Value:
        """The mask of those valid slots that the token attends to, given that of all; what is kept beside keys and
        values is written into the token's slot."""
        return mask

    def _next_slot(self, build: Build) -> Value:
        counts = _counts(build)
        return build.inline(self.slots.next_slot, counts["seen"], counts["base"], name=f"slot_of_{self.slots.slots}")

    def _mask(self, build: Build, slopes: Value, given: tuple[Value, ...]) -> Value:
        """What is added to the logits of a decoded token."""
        if slopes is not None:
            return build.inline(_biased_mask(self.slots), *given, slopes)
        if self.slots.masks_by_position:
            return build.inline(_decode_mask(self.slots, self.dtype), *given)
        return build.once(("mask", self.slots), lambda: self._shared_mask(build))

    def _shared_mask(self, build: Build) -> Value:
        """A mask that depends on counters alone. A slot's validity does not depend on how many slots follow it, so that
        one mask as long as the largest layer serves every layer that starts to use its slots in order."""
        caches = [state for state in build.states if isinstance(state, KVState)]
        counts, first = _counts(build), build.held(caches[0])  # any positions: only their device is looked at
        in_order = [cache.slots for cache in caches if _fills_in_order(cache.slots)]
        longest = max(in_order, key=lambda slots: slots.slots, default=self.slots)
        name = f"mask_of_{self.slots.slots}"
        if not _fills_in_order(self.slots) or self.slots == longest:
            mask = _decode_mask(self.slots, self.dtype)
            return build.inline(mask, first["positions"], counts["seen"], counts["base"], name=name)
        owner = next(cache for cache in caches if cache.slots == longest)
        whole = build.once(("mask", longest), lambda: owner._shared_mask(build))
        return build.emit(aten.slice.Tensor, whole, 3, 0, self.slots.slots, name=name)

    def _open_mask(self, positions: Tensor, seen: Tensor, base: Tensor) -> Tensor:
        return self.slots.extend_mask(positions, seen, base, length=1)  # the same for all new tokens

    def _window_mask(self, positions: Tensor, seen: Tensor, base: Tensor, q: Tensor) -> Tensor:
        return self.slots.extend_mask(positions, seen, base, q.shape[2])

    # What a session must know

    def refuse_tokens(self, tokens: int) -> None:
        if self.slots.eviction == "none" and tokens > self.slots.slots:
            raise CapacityError(
                f"{tokens} tokens do not fit into the {self.slots.slots} slots of {self.where}, and full budgets "
                "never evict; plan larger budgets, or choose an eviction policy"
            )

    def steps_left(self, seen: int, base: int) -> int | None:
        if self.slots.eviction == "none":
            return self.slots.slots - seen
        if self.slots.eviction == "append" and not self.slots.takes_turns:
            return self.slots.slots - (min(base, self.slots.capacity) + seen - base)
        return None

    def refuse_step(self) -> None:
        raise CapacityError(
            f"the room for {self.slots.slots - self.slots.capacity} appended tokens that was set aside is used up; "
            "transform with a larger max_new_tokens, or choose eviction='ring'"
        )

    def problem(self, held: Mapping[str, Tensor], counts: Mapping[str, Tensor]) -> str | None:
        """Check positions read from a file: a wrong one would silently mask the wrong slots."""
        positions = held["positions"]
        highest = counts["seen"].clamp(min=self.slots.slots)[:, None, None]
        possible = bool(((positions >= 0) & (positions < highest)).all())
        return None if possible else f"the positions of {self.where} are not those of a session"

    # Where a decode step returns its token for the caller to write, as TensorRT's may

    def returned_parts(self) -> tuple[Buffer, ...]:
        """What such a step returns: the token's keys and values, under `"scored"` its slots and all scores."""
        heads = (self.rows, self.spec.kv_heads)
        parts = [
            self._buffer(buffer.field, (*heads, 1, buffer.shape[-1]), self.dtype)
            for buffer in self.buffers
            if buffer.holds == "kv" and buffer.nbytes
        ]
        if self.slots.eviction == "scored":
            parts.append(self._buffer("slot", heads, torch.int64))
            parts.append(self._buffer("scores", (*heads, self.slots.slots), torch.float32))
        return tuple(parts)

    def write_returned(
        self, held: Mapping[str, Tensor], parts: Mapping[str, Tensor], seen: Tensor, slot: Callable[[SlotPlan], Tensor]
    ) -> None:
        """Write what such a step returned, by field, into the buffers that it has read.

        Args:
            seen: int64 `[rows]`, tokens seen before this one.
            slot: int64 `[rows]`, the slot that the token takes under a plan that follows from counters.
        """
        row = torch.arange(self.rows, device=seen.device)[:, None]
        head = torch.arange(self.spec.kv_heads, device=seen.device)
        scored = self.slots.eviction == "scored"
        at = (row, head, parts["slot"] if scored else slot(self.slots)[:, None])
        for field in ("k", "v"):
            if field in parts:
                held[field].index_put_(at, parts[field][:, :, 0])
        if scored:
            positions = held["positions"]
            positions.index_put_(at, seen[:, None].expand(-1, self.spec.kv_heads).to(positions.dtype))
            held["scores"].copy_(parts["scores"])


def _counts(build: Build) -> Mapping[str, Value]:
    return next(build.held(state) for state in build.states if state.kind == "counters")


def _fills_in_order(slots: SlotPlan) -> bool:
    """Whether a slot is valid once so many tokens have been seen, whatever else the plan is."""
    return not slots.masks_by_position and slots.eviction != "append"


def _decode_mask(slots: SlotPlan, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def mask(positions: Tensor, seen: Tensor, base: Tensor) -> Tensor:
        valid = slots.decode_mask(positions, seen, base)
        return torch.zeros(valid.shape, dtype=dtype, device=seen.device).masked_fill(~valid, float("-inf"))

    return mask


def _biased_mask(slots: SlotPlan) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def mask(positions: Tensor, seen: Tensor, base: Tensor, slopes: Tensor) -> Tensor:
        valid = slots.decode_mask(positions, seen, base)
        bias = distance_bias(slopes, slots.decode_ages(positions, seen, base)[:, :, None])
        return bias.masked_fill(~valid[:, :, None], float("-inf")).flatten(1, 2)

    return mask


def _of_rows_with_tokens(gained: Tensor, held: Tensor, length: Tensor) -> Tensor:
    return torch.where((length > 0)[:, None, None], gained, held)

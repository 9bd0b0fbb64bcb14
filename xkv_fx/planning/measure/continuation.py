"""Running the continuation of a prompt again under other budgets, without prefilling again.

A fresh prefill attends to all of its tokens whatever the budgets are; these decide only what each layer holds
afterwards. So one full run of prompt and continuation serves every plan: its K/V and scores give the survivors of any
capacity, and its values give the inputs of every layer up to the first whose capacity differs. Only the continuation's
tokens are then run again, those of many plans in one pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from xkv_fx.budgets import Plan
from xkv_fx.capture.captured import CapturedModel
from xkv_fx.capture.facts import UNSHARDED, Shard
from xkv_fx.errors import PassError, PromptError
from xkv_fx.formats import LayerFormats, codes_keys
from xkv_fx.layers import LayerSpec
from xkv_fx.mean_keys import MeanKey
from xkv_fx.passes.analyses.find_attention import check_borrowed
from xkv_fx.passes.measure.cut_at_attention import CutModel, Segment, Value, cut_at_attention
from xkv_fx.passes.pipeline import run_pipeline
from xkv_fx.passes.prepare.clean_graph import CleanGraph
from xkv_fx.planning.measure.divergence import kl_divergence
from xkv_fx.planning.measure.held import Heads, Held, HeldScored, LayerRun, Storing, as_stored, attend, hold, hold_all
from xkv_fx.planning.measure.second_reading import scores_of_second_reading
from xkv_fx.runtime.attention import causal_attention
from xkv_fx.runtime.recurrence import Recurrence
from xkv_fx.runtime.scorers import Scorer, future_positions, reading_of, score_tokens
from xkv_fx.runtime.slots import SlotPlan, slot_plans

# Tokens of all plans together in one pass: enough to keep the matrix products busy.
_TOKENS_AT_ONCE = 1024
# Bytes of logits at once.
_LOGIT_BYTES = 128 * 2**20

LayerPlan = tuple[SlotPlan | None, Storing | None]
"""How a layer uses its slots, None where it holds every token; and how it stores them, None for the model's dtype."""
FULL: LayerPlan = (None, None)


@dataclasses.dataclass(frozen=True)
class HeadPlans:
    """How each KV head of one layer holds its tokens."""

    heads: tuple[LayerPlan, ...]


LayerPlans = Sequence[LayerPlan | HeadPlans]
"""One for each layer that owns a cache."""


def layer_plans(plan: Plan, layers: tuple[LayerSpec, ...], continuation: int, shard: Shard = UNSHARDED) -> LayerPlans:
    """How the layers hold what `plan` says, with room for a continuation where it is appended.

    Args:
        shard: the part of the model that has these layers.

    Raises:
        BudgetError: the plan does not fit the layers.
    """
    means = plan.subtracted(layers, shard.rank, shard.size) or (None,) * len(layers)
    of_layer: list[dict[int, LayerPlan]] = [{} for _ in layers]
    for group, slots in zip(plan.groups(layers), slot_plans(plan, layers, continuation), strict=True):
        storing = storing_as(layers[group.layer], group.formats, means[group.layer])
        of_layer[group.layer] |= dict.fromkeys(group.heads, (slots, storing))
    return tuple(_of_heads([planned[head] for head in sorted(planned)]) for planned in of_layer)


def storing_as(spec: LayerSpec, formats: LayerFormats | None, mean_key: MeanKey | None) -> Storing | None:
    """How a layer stores its tokens, None for the model's dtype; keys in that are stored as they are."""
    if formats is None:
        return None
    mean = mean_key if codes_keys(formats) else None
    return Storing(formats, mean, mean if spec.value_dim == 0 else None)


def _of_heads(plans: Sequence[LayerPlan]) -> LayerPlan | HeadPlans:
    """The plan of a layer, given those of its KV heads."""
    return plans[0] if len(set(plans)) == 1 else HeadPlans(tuple(plans))


def cut_model(captured: CapturedModel, scorer: Scorer | None = None) -> CutModel:
    """The captured graph of a prompt, cut at its attentions.

    Args:
        scorer: what the prompts' tokens will be ranked by; needed for one that looks at unrotated queries.

    Raises:
        UnsupportedModelError: see `cut_at_attention`.
    """
    module = run_pipeline(captured.graph("prompt"), (CleanGraph(),)).module
    cut = cut_at_attention(module, None if scorer is None else future_positions(scorer))
    return dataclasses.replace(cut, max_positions=captured.max_positions)


@dataclasses.dataclass(frozen=True)
class Strayed:
    """How far plans stray from the full cache, for each of T continuation tokens, once it has been fed.

    Attributes:
        kl: KL(full || plan) of the next-token distributions, nats, float64 `[plans, T]`.
        agree: whether both prefer the same next token, bool `[plans, T]`.
    """

    kl: Tensor
    agree: Tensor


@dataclasses.dataclass(frozen=True)
class FullRun:
    """A prompt of S tokens and its continuation of T, run with the full cache.

    Attributes:
        model: the cut graph.
        layers: of each attention, K/V and scores of the prompt's tokens; those of the cache's owner where it borrows.
        values: every value that crosses from one segment to a later one, and the inputs of each attention, for the
            continuation's tokens alone.
        logits: of the continuation's tokens, `[T, vocabulary]`.
        length_dims: which dimension of each of the values runs over tokens.
        tokens: T.
        states: of each layer that mixes tokens by a state, what it is behind the prompt, by the layer's index. Like the
            prompt's K/V, it is the same under every plan.
    """

    model: CutModel
    layers: tuple[LayerRun, ...]
    values: dict[str, Tensor]
    length_dims: dict[str, int]
    logits: Tensor
    tokens: int
    states: dict[int, tuple[Tensor, ...]] = dataclasses.field(default_factory=dict)
    _stored: dict[tuple[int, Storing], LayerRun] = dataclasses.field(default_factory=dict, repr=False)
    _held: dict[tuple[int, LayerPlan, Heads], Held | HeldScored] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def prompt_tokens(self) -> int:
        """S, the tokens that prefill sees."""
        return self.layers[0].k.shape[2]

    def held(self, index: int, plan: LayerPlan, heads: Heads = None) -> Held | HeldScored:
        """What an attention reaches after the prompt, or some of its KV heads do; chosen once for each cache and
        plan."""
        site = self.model.sites[index]
        slots, storing = plan
        check_borrowed(site, "" if slots is None else slots.eviction)
        key = (site.index, plan, heads)
        if key not in self._held:
            run = self.stored(index, storing).of_heads(heads)
            self._held[key] = hold_all(run, self.tokens) if slots is None else hold(run, slots, self.tokens)
        return self._held[key]

    def stored(self, index: int, storing: Storing | None) -> LayerRun:
        """What an attention's layer computed for the prompt, K/V as they come back from slots that store them so; made
        once for each cache. Its scores are those of the prompt, in which nothing was stored yet."""
        run = self.layers[index]
        if storing is None:
            return run
        key = (self.model.sites[index].index, storing)
        if key not in self._stored:
            k, v = as_stored(run.k, run.v, storing)
            self._stored[key] = dataclasses.replace(run, k=k, v=v)
        return self._stored[key]

    def divergence(self, plans: Sequence[LayerPlans]) -> Tensor:
        """As `compare`, the KL divergence alone."""
        return self.compare(plans).kl

    def compare(self, plans: Sequence[LayerPlans]) -> Strayed:
        """How far the next-token distributions under each plan are from those of the full cache.

        A layer with formats stores what survives the prompt in them, and each token of the continuation before it is
        attended to; the prompt itself is attended to as it is.
        """
        order = sorted(range(len(plans)), key=lambda row: self._first_cut(plans[row]))
        at_once = max(1, _TOKENS_AT_ONCE // self.tokens)
        kl = torch.empty(len(plans), self.tokens, dtype=torch.float64)
        agree = torch.empty(len(plans), self.tokens, dtype=torch.bool)
        for start in range(0, len(plans), at_once):
            part = order[start : start + at_once]
            found = self._compare_together([plans[row] for row in part])
            kl[part], agree[part] = found.kl.cpu(), found.agree.cpu()
            self._forget()
        return Strayed(kl, agree)

    def _forget(self) -> None:
        """Let go of what cut layers hold, which would add up to many caches."""
        self._stored.clear()
        for key in [key for key in self._held if key[1:] != (FULL, None)]:
            del self._held[key]

    @torch.no_grad()
    def _compare_together(self, plans: Sequence[LayerPlans]) -> Strayed:
        """As `compare`, of plans in the order of their first layers that are not full. A plan joins the batch in
        that layer; before, it is the full run."""
        attentions = len(self.layers)
        starts = [min(self._first_cut(plan), attentions - 1) for plan in plans]
        live: dict[str, Tensor] = {}
        for index in range(starts[0], attentions):
            site = self.model.sites[index]
            rows = sum(start <= index for start in starts)
            joining = sum(start == index for start in starts)
            live = {name: self._extended(name, value, joining) for name, value in live.items()}
            q, k, v = (_split(self._tiled(Value(node.name, 2), live, rows), rows) for node in (site.q, site.k, site.v))
            out = self._attended(index, q, k, v, [plan[site.index] for plan in plans[:rows]])
            live = {name: value for name, value in live.items() if name in self.model.needed_from[index + 1]}
            live[site.node.name] = _join(out)
            behind = self.model.segments[index + 1 :]
            for segment in behind[:1] if index + 1 < attentions else behind[:-1]:
                made = segment.run(
                    (self._tiled(value, live, rows) for value in segment.inputs), self._recur_from_prompt
                )
                live |= {
                    value.name: part
                    for value, part in zip(segment.outputs, made, strict=True)
                    if value.size is None and value.length_dim is not None
                }
        return self._compare_logits(self.model.segments[-1], live, len(plans))

    def _recur_from_prompt(self, recurrence: Recurrence, inputs: tuple[Tensor, ...]) -> Tensor:
        """A layer that mixes tokens by a state, on the continuations of several plans, each behind the prompt."""
        split = [part.view(-1, self.tokens, *part.shape[2:]) for part in inputs]
        rows = split[0].shape[0]
        states = [state.expand(rows, *state.shape[1:]) for state in self.states[recurrence.index]]
        return recurrence.go_on(split, states)[0].reshape(1, rows * self.tokens, -1)

    def _attended(self, index: int, q: Tensor, k: Tensor, v: Tensor, plans: Sequence[LayerPlan | HeadPlans]) -> Tensor:
        """The attention of continuations `[rows, ...]`, each under its plan of the layer: heads that have the same
        plans in all rows together, of these rows those of one plan together."""
        kv_heads = k.shape[1]
        width = q.shape[1] // kv_heads
        out = q.new_empty((*q.shape[:3], v.shape[3]))
        for heads, of_rows in _alike(plans, kv_heads):
            some = None if len(heads) == kv_heads else heads
            run = self.layers[index].of_heads(some)
            asking = [head * width + place for head in heads for place in range(width)]
            queries, keys, values = (q, k, v) if some is None else (q[:, asking], k[:, list(heads)], v[:, list(heads)])
            groups: dict[LayerPlan, list[int]] = {}
            for row, plan in enumerate(of_rows):
                groups.setdefault(plan, []).append(row)
            for plan, members in groups.items():
                held = self.held(index, plan, some)
                storing = None if plan[1] is None else plan[1].of_heads(some)
                new = as_stored(keys[members], values[members], storing)
                attended = attend(queries[members], *new, held, run)
                if some is None:
                    out[members] = attended
                else:
                    out[torch.tensor(members)[:, None], asking] = attended
        return out

    def _first_cut(self, plan: LayerPlans) -> int:
        """The first attention whose layer does not hold everything; the number of attentions if there is none."""
        cut = (at for at, site in enumerate(self.model.sites) if plan[site.index] != FULL)
        return next(cut, len(self.model.sites))

    def _extended(self, name: str, value: Tensor, joining: int) -> Tensor:
        """A value of the plans so far, and for those that join, the full run's."""
        if not joining:
            return value
        dim = self.length_dims[name]
        return torch.cat((value, *[self.values[name]] * joining), dim)

    def _tiled(self, value: Value, live: dict[str, Tensor], rows: int) -> Tensor:
        """A value for all plans: what was run again, or the full run's, once for each plan along the tokens."""
        if value.size is not None:
            return value.size_of(rows * self.tokens)  # type: ignore[return-value]
        if value.name in live:
            return live[value.name]
        full = self.values[value.name]
        if value.length_dim is None:
            return full
        return full.repeat([rows if dim == value.length_dim else 1 for dim in range(full.dim())])

    def _compare_logits(self, segment: Segment, live: dict[str, Tensor], rows: int) -> Strayed:
        """The last segment, a few plans at a time, since logits are large."""
        reference, preferred = torch.log_softmax(self.logits.float(), -1), self.logits.argmax(-1)
        at_once = max(1, _LOGIT_BYTES // (reference.numel() * 4))
        kl, agree = [], []
        for start in range(0, rows, at_once):
            part = range(start, min(start + at_once, rows))
            inputs = []
            for value in segment.inputs:
                if value.name not in live or value.length_dim is None:
                    inputs.append(self._tiled(value, live, len(part)))
                else:
                    span = len(part) * self.tokens
                    inputs.append(live[value.name].narrow(value.length_dim, part.start * self.tokens, span))
            logits = _logits(self.model, segment, segment.run(inputs)).view(len(part), self.tokens, -1)
            kl.append(kl_divergence(reference, logits))
            agree.append(logits.argmax(-1) == preferred)
        return Strayed(torch.cat(kl), torch.cat(agree))


@torch.no_grad()
def run_full(model: CutModel, scorer: Scorer, ids: Tensor, continuation: int) -> FullRun:
    """Run prompt and continuation with the full cache.

    Args:
        model: a graph cut for one row, and for this scorer.
        scorer: the policy's, which ranks the prompt's tokens in each layer.
        ids: int64 `[1, S + T]`.
        continuation: T, how many of the last tokens are the continuation.

    Raises:
        PromptError: no token before the continuation.
        PassError: the graph was not cut for this scorer.
    """
    total = ids.shape[1]
    prompt = total - continuation
    if prompt < 1:
        raise PromptError(f"a prompt of {total} tokens leaves none before its continuation of {continuation}")
    positions = torch.arange(total, device=ids.device)[None]
    length = torch.full((1,), prompt, dtype=torch.int64, device=ids.device)
    reading = reading_of(scorer)
    read = {} if reading is None else scores_of_second_reading(model, scorer, reading, ids[:, :prompt])
    before_rotation = _before_rotation(model, scorer, length)
    live = dict(zip(model.inputs, (ids, positions), strict=True))
    values = {name: value[:, prompt:] for name, value in live.items()}
    length_dims = dict.fromkeys(live, 1)
    layers: list[LayerRun] = []
    owners: dict[int, LayerRun] = {}
    states: dict[int, tuple[Tensor, ...]] = {}

    def recur(recurrence: Recurrence, given: tuple[Tensor, ...]) -> Tensor:
        of_prompt, states[recurrence.index] = recurrence.begin([part[:, :prompt] for part in given])
        rest = [part[:, prompt:] for part in given]
        return torch.cat((of_prompt, recurrence.go_on(rest, states[recurrence.index])[0]), 1)

    for index, segment in enumerate(model.segments[:-1]):
        inputs = [live[value.name] if value.size is None else value.size_of(total) for value in segment.inputs]
        made = dict(zip((value.name for value in segment.outputs), segment.run(inputs, recur), strict=True))
        for value in segment.outputs:
            if value.length_dim is not None:
                values[value.name] = made[value.name].narrow(value.length_dim, prompt, continuation).clone()
                length_dims[value.name] = value.length_dim
            elif value.size is None:
                values[value.name] = made[value.name]
        live |= made
        if index >= len(model.sites):  # behind the last attention
            continue
        site = model.sites[index]
        q, k, v = (live[node.name] for node in (site.q, site.k, site.v))
        form = dataclasses.replace(site.form, sink_logits=model.sink_logits.get(index))
        owner = owners.get(site.index)
        if owner is None:
            scores = read[site.index] if read else score_tokens(
                q[:, :, :prompt], k[:, :, :prompt], v[:, :, :prompt], length, None, form.scale, scorer,
                form.sliding_window, form.softcap, form.sink_logits, **before_rotation(index, live),
            )  # fmt: skip
            kept = k[:, :, :prompt].clone(), v[:, :, :prompt].clone(), scores
        else:
            kept = owner.k, owner.v, owner.scores
        run = LayerRun(*kept, form)
        owners.setdefault(site.index, run)
        layers.append(run)
        attended = causal_attention(q, k, v, form)[0].contiguous()
        live = {name: part for name, part in live.items() if name in model.needed_from[index + 1]}
        live[site.node.name] = attended
        values[site.node.name] = attended[:, :, prompt:].clone()
        length_dims[site.node.name] = 2
    last = model.segments[-1]
    inputs = [values[value.name] if value.size is None else value.size_of(continuation) for value in last.inputs]
    logits = _logits(model, last, last.run(inputs))
    return FullRun(model, tuple(layers), values, length_dims, logits[0], continuation, states)


def _before_rotation(
    model: CutModel, scorer: Scorer, length: Tensor
) -> Callable[[int, dict[str, Tensor]], dict[str, Any]]:
    """What a scorer is given about an attention's queries before they are rotated, from the live values."""
    wanted = future_positions(scorer)
    if wanted is None:
        return lambda index, live: {}
    if wanted != model.future_positions:
        raise PassError(f"the graph was not cut for {scorer}; cut it for the scorer that it is run with")
    kinds = dict.fromkeys(rotation.mean for rotation in model.rotations)
    means = {kind: None if kind is None else kind(length - 1) for kind in kinds}
    prompt = int(length)

    def of_site(index: int, live: dict[str, Tensor]) -> dict[str, Any]:
        rotation = model.rotations[index]
        unrotated = rotation.arrange(live[rotation.source.name])[:, :, :prompt]
        return {"unrotated": unrotated, "rotation": means[rotation.mean]}

    return of_site


def _logits(model: CutModel, segment: Segment, made: tuple[Tensor, ...]) -> Tensor:
    return next(part for value, part in zip(segment.outputs, made, strict=True) if value.name == model.logits)


def _alike(plans: Sequence[LayerPlan | HeadPlans], kv_heads: int) -> list[tuple[tuple[int, ...], list[LayerPlan]]]:
    """Which KV heads of a layer have the same plans in all rows, and these plans, one for each row."""
    if all(not isinstance(plan, HeadPlans) for plan in plans):
        return [(tuple(range(kv_heads)), list(plans))]  # type: ignore[arg-type]  # as was just asked
    of_head: dict[tuple[LayerPlan, ...], list[int]] = {}
    for head in range(kv_heads):
        of_rows = tuple(plan.heads[head] if isinstance(plan, HeadPlans) else plan for plan in plans)
        of_head.setdefault(of_rows, []).append(head)
    return [(tuple(heads), list(of_rows)) for of_rows, heads in of_head.items()]


def _split(joined: Tensor, rows: int) -> Tensor:
    """`[1, heads, R * T, dim]` -> `[R, heads, T, dim]`."""
    _, heads, tokens, dim = joined.shape
    return joined.view(heads, rows, tokens // rows, dim).transpose(0, 1)


def _join(split: Tensor) -> Tensor:
    """`[R, heads, T, dim]` -> `[1, heads, R * T, dim]`."""
    rows, heads, tokens, dim = split.shape
    return split.transpose(0, 1).reshape(1, heads, rows * tokens, dim)

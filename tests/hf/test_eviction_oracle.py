"""Eviction against transformers itself: a `DynamicCache` of just the tokens that are kept gives the same logits.

The oracle prefills with transformers, gathers the K/V of the kept tokens head by head, and decodes with transformers,
giving positions explicitly. What prefill keeps is computed by hand from the attention that transformers reports.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from by_hand import default_recent, snapkv_scores, survivors
from ready_models import model, transformed
from tiny_models import WINDOW, random_ids
from torch import Tensor
from transformers import DynamicCache

from xkv_fx import Budgets, Policy
from xkv_fx.hf.cache import SessionCache
from xkv_fx.hf.generation import BudgetedLM
from xkv_fx.policy import Eviction

HEADS, GROUP = 2, 2
STEPS = 12
ROOM = 16
TOKENS = random_ids(1, 64, seed=3)
Kept = list[list[int]]
"""For each KV head the ordinals of the tokens that it holds, ascending."""


@dataclasses.dataclass
class Oracle:
    """A transformers model over a cache from which tokens are taken away.

    Attributes:
        family: which model.
        keys, values: of every token seen so far, `[kv_heads, tokens, head_dim]` for each layer.
        kept: of each layer.
    """

    family: str
    keys: list[Tensor]
    values: list[Tensor]
    kept: list[Kept]

    @classmethod
    def prefill(cls, family: str, ids: Tensor, kept: list[Kept]) -> Oracle:
        cache = DynamicCache()
        with torch.no_grad():
            model(family)(ids, past_key_values=cache, use_cache=True)
        return cls(family, [layer.keys[0] for layer in cache.layers], [layer.values[0] for layer in cache.layers], kept)

    def windows(self) -> list[int | None]:
        config = model(self.family).config
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        return [WINDOW if kind == "sliding_attention" else None for kind in kinds]

    def gathered(self) -> DynamicCache:
        """The kept tokens alone."""
        cache = DynamicCache()
        for layer, kept in enumerate(self.kept):
            for_head = [torch.tensor(tokens) for tokens in kept]
            k, v = (
                torch.stack([held[head, tokens] for head, tokens in enumerate(for_head)])[None]
                for held in (self.keys[layer], self.values[layer])
            )
            cache.update(k, v, layer)
        return cache

    def feed(self, ids: Tensor) -> Tensor:
        """Logits of new tokens that attend to the kept ones and causally to each other."""
        seen, new = self.keys[0].shape[1], ids.shape[1]
        cache = self.gathered()
        masks = {
            kind: self._mask(layer, seen, new)
            for layer, kind in enumerate(getattr(model(self.family).config, "layer_types", ()) or ())
        }
        options = {"attention_mask": masks} if masks else {}
        with torch.no_grad():
            positions = torch.arange(seen, seen + new)[None]
            logits = model(self.family)(ids, past_key_values=cache, position_ids=positions, **options).logits
        for layer, held in enumerate(cache.layers):
            self.keys[layer] = torch.cat((self.keys[layer], held.keys[0, :, -new:]), 1)
            self.values[layer] = torch.cat((self.values[layer], held.values[0, :, -new:]), 1)
        return logits  # type: ignore[no-any-return]

    def _mask(self, layer: int, seen: int, new: int) -> Tensor:
        """What each query may attend to, additive `[1, query_heads, new, kept + new]`, for families that take one."""
        window = self.windows()[layer] or 10**9
        query = torch.arange(seen, seen + new)[:, None]
        rows = []
        for tokens in self.kept[layer]:
            key = torch.tensor([*tokens, *range(seen, seen + new)])
            rows += [(key <= query) & (key > query - window)] * GROUP
        reach = torch.stack(rows)[None]
        return torch.zeros(reach.shape).masked_fill(~reach, torch.finfo(torch.float32).min)


def kept_of(session: SessionCache, layers: int = 2) -> list[Kept]:
    """What a session says that it keeps."""
    kept = []
    for layer in range(layers):
        heads = session.kept_positions(layer)[0].tolist()
        kept.append([sorted(token for token in head if token >= 0) for head in heads])
    return kept


def kept_by_hand(family: str, ids: Tensor, capacities: tuple[int, ...], policy: Policy) -> list[Kept]:
    """What prefill keeps by SnapKV's rule, from the attention probabilities that transformers returns."""
    source = model(family)
    before = source.config._attn_implementation
    source.set_attn_implementation("eager")  # the only one that returns them
    try:
        with torch.no_grad():
            attentions = source(ids, output_attentions=True, use_cache=False).attentions
    finally:
        source.set_attn_implementation(before)
    return [
        survivors(snapkv_scores(weights[0], HEADS), capacity, policy.recent or default_recent(capacity), policy.sinks)
        for weights, capacity in zip(attentions, capacities, strict=True)
    ]


def prefill(llm: BudgetedLM, length: int) -> SessionCache:
    session = llm.new_session()
    llm(TOKENS[:, :length], past_key_values=session, logits_to_keep=1)
    return session


def decode(llm: BudgetedLM, session: SessionCache, token: int) -> Tensor:
    return llm(TOKENS[:, token : token + 1], past_key_values=session, decoding=True).logits


def dropped_by_ring(token: int, capacity: int, recent: int) -> int | None:
    """The token that gives way to token number `token`: none while slots are free, else the oldest of the recent."""
    return None if token < capacity else token - recent


POLICIES = [Policy(), Policy(recent=5), Policy(recent=2, sinks=3)]


@pytest.mark.parametrize("length", [30, 14, 6])
@pytest.mark.parametrize("policy", POLICIES, ids=["default", "recent", "sinks"])
def test_prefill_keeps_what_snapkv_chooses(policy: Policy, length: int) -> None:
    capacities = (12, 17)
    session = prefill(transformed(Budgets(capacities, policy)), length)
    assert kept_of(session) == kept_by_hand("llama", TOKENS[:, :length], capacities, policy)


@pytest.mark.parametrize("length", [30, 14, 6])
def test_append(length: int) -> None:
    """Generated tokens are all kept beside the survivors of the prompt."""
    llm = transformed(Budgets((12, 17), Policy(eviction="append")), max_new_tokens=ROOM)
    session = prefill(llm, length)
    oracle = Oracle.prefill("llama", TOKENS[:, :length], kept_of(session))
    for token in range(length, length + STEPS):
        expected = oracle.feed(TOKENS[:, token : token + 1])
        torch.testing.assert_close(decode(llm, session, token), expected, atol=1e-4, rtol=0)
        for heads in oracle.kept:
            for tokens in heads:
                tokens.append(token)
        assert kept_of(session) == oracle.kept


@pytest.mark.parametrize("length", [30, 14, 6])
@pytest.mark.parametrize("policy", POLICIES, ids=["default", "recent", "sinks"])
def test_ring(policy: Policy, length: int) -> None:
    """Free slots are filled first; then each token takes the place of the oldest of the newest `recent`."""
    capacities = (12, 17)
    llm = transformed(Budgets(capacities, policy))
    session = prefill(llm, length)
    oracle = Oracle.prefill("llama", TOKENS[:, :length], kept_of(session))
    for token in range(length, length + STEPS):
        for capacity, heads in zip(capacities, oracle.kept, strict=True):
            gone = dropped_by_ring(token, capacity, policy.recent or default_recent(capacity))
            for tokens in heads:
                if gone is not None:
                    tokens.remove(gone)
        expected = oracle.feed(TOKENS[:, token : token + 1])
        torch.testing.assert_close(decode(llm, session, token), expected, atol=1e-4, rtol=0)
        for heads in oracle.kept:
            for tokens in heads:
                tokens.append(token)
        assert kept_of(session) == oracle.kept


@pytest.mark.parametrize("length", [30, 6])
def test_scored(length: int) -> None:
    """Which token goes is the op's choice and tested with it; here, that the buffers hold what the session says."""
    llm = transformed(Budgets((12, 17), Policy(eviction="scored")))
    session = prefill(llm, length)
    oracle = Oracle.prefill("llama", TOKENS[:, :length], kept_of(session))
    for token in range(length, length + STEPS):
        logits = decode(llm, session, token)
        kept = kept_of(session)
        for before, after, capacity in zip(oracle.kept, kept, (12, 17), strict=True):
            for old, new in zip(before, after, strict=True):
                assert set(new) <= {*old, token}
                assert len(new) == min(token + 1, capacity)
                assert set(range(max(0, token + 1 - default_recent(capacity)), token + 1)) <= set(new)
        oracle.kept = [[[other for other in head if other != token] for head in heads] for heads in kept]
        torch.testing.assert_close(logits, oracle.feed(TOKENS[:, token : token + 1]), atol=1e-4, rtol=0)
        oracle.kept = kept


@pytest.mark.parametrize("eviction", ["ring", "append", "scored"])
def test_a_turn_attends_to_what_was_kept(eviction: Eviction) -> None:
    """A second prompt sees the survivors of the first and itself; survivors are then chosen among both."""
    llm = transformed(Budgets((12, 12), Policy(eviction=eviction)), max_new_tokens=ROOM)
    session = prefill(llm, 20)
    for token in (20, 21, 22):
        decode(llm, session, token)
    oracle = Oracle.prefill("llama", TOKENS[:, :20], kept_of(prefill(llm, 20)))
    replay = prefill(llm, 20)
    for token in (20, 21, 22):  # the oracle decodes along, over what the session keeps step by step
        decode(llm, replay, token)
        now = kept_of(replay)
        oracle.kept = [[[other for other in head if other != token] for head in heads] for heads in now]
        oracle.feed(TOKENS[:, token : token + 1])
        oracle.kept = now
    for start, stop in ((23, 32), (32, 33), (33, 50)):
        turn = TOKENS[:, start:stop]
        torch.testing.assert_close(llm(turn, past_key_values=session).logits, oracle.feed(turn), atol=1e-4, rtol=0)
        before, oracle.kept = oracle.kept, kept_of(session)
        for old, new in zip(before, oracle.kept, strict=True):
            for candidates, tokens in zip(old, new, strict=True):
                assert len(tokens) == 12
                assert set(tokens) <= {*candidates, *range(start, stop)}
                assert set(range(stop - default_recent(12), stop)) <= set(tokens)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("capacities", [(5, 12), (30, 12)], ids=["less than the window", "the whole window"])
def test_sliding_window_layers(family: str, capacities: tuple[int, int]) -> None:
    """Below its sliding window a layer keeps survivors and masks by position; at the window it is all ring."""
    llm = transformed(Budgets(capacities), family=family)
    slots = (min(capacities[0], WINDOW), capacities[1])
    recents = (WINDOW if capacities[0] >= WINDOW else default_recent(capacities[0]), default_recent(capacities[1]))
    for length in (30, 4):
        session = prefill(llm, length)
        oracle = Oracle.prefill(family, TOKENS[:, :length], kept_of(session))
        for token in range(length, length + STEPS):
            for capacity, recent, heads in zip(slots, recents, oracle.kept, strict=True):
                gone = dropped_by_ring(token, capacity, recent)
                for tokens in heads:
                    if gone is not None:
                        tokens.remove(gone)
            expected = oracle.feed(TOKENS[:, token : token + 1])
            torch.testing.assert_close(decode(llm, session, token), expected, atol=1e-4, rtol=0)
            for heads in oracle.kept:
                for tokens in heads:
                    tokens.append(token)
            assert kept_of(session) == oracle.kept


@pytest.mark.parametrize("length", [30, 4])
def test_append_in_a_sliding_window_layer(length: int) -> None:
    """It takes no more slots than its window is long: what it gives up then has left the window."""
    budgets = Budgets((5, 12), Policy(eviction="append"))
    llm = transformed(budgets, family="gemma2", max_new_tokens=STEPS)
    session = prefill(llm, length)
    assert [session.session.state[f"k_{layer}"].shape[2] for layer in range(2)] == [WINDOW, 12 + STEPS]
    assert llm.kv_bytes == session.kv_bytes == budgets.kv_bytes(model("gemma2"), max_new_tokens=STEPS)
    oracle = Oracle.prefill("gemma2", TOKENS[:, :length], kept_of(session))
    for token in range(length, length + STEPS):
        expected = oracle.feed(TOKENS[:, token : token + 1])
        torch.testing.assert_close(decode(llm, session, token), expected, atol=1e-4, rtol=0)
        for heads in oracle.kept:
            for tokens in heads:
                tokens.append(token)
        assert kept_of(session) == [[head[-WINDOW:] for head in oracle.kept[0]], oracle.kept[1]]
    turn = TOKENS[:, length + STEPS : length + STEPS + 3]
    torch.testing.assert_close(llm(turn, past_key_values=session).logits, oracle.feed(turn), atol=1e-4, rtol=0)


def test_sliding_window_layers_in_a_turn() -> None:
    llm = transformed(Budgets((5, 12)), family="gemma2")
    session = prefill(llm, 20)
    oracle = Oracle.prefill("gemma2", TOKENS[:, :20], kept_of(session))
    for start, stop in ((20, 23), (23, 40)):
        turn = TOKENS[:, start:stop]
        torch.testing.assert_close(llm(turn, past_key_values=session).logits, oracle.feed(turn), atol=1e-4, rtol=0)
        oracle.kept = kept_of(session)


def test_the_oracle_with_nothing_taken_away_is_transformers() -> None:
    for family in ("llama", "gemma2", "gemma3", "gpt_oss"):
        everything = [[list(range(20)) for _ in range(HEADS)] for _ in range(2)]
        oracle = Oracle.prefill(family, TOKENS[:, :20], everything)
        with torch.no_grad():
            expected = model(family)(TOKENS[:, :25], use_cache=False).logits[:, 20:]
        torch.testing.assert_close(oracle.feed(TOKENS[:, 20:25]), expected, atol=1e-4, rtol=0)

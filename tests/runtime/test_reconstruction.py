"""Reading a prompt again: scores are those of transformers' own attention, and what is kept follows from them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ready_models import captured, model, remember_captures
from tiny_models import llama, random_ids
from torch import Tensor

import xkv_fx
from xkv_fx import BudgetError, Budgets, Policy, PromptError
from xkv_fx.planning.measure.continuation import cut_model
from xkv_fx.planning.measure.second_reading import scores_of_second_reading
from xkv_fx.runtime.reading import Reading
from xkv_fx.runtime.scorers import Reconstruction

IDS = random_ids(1, 40)
ASKED = (5, 9, 7)
OPTIONS = {"instruction": "5 9 7"}


@pytest.fixture(autouse=True)
def _captures_once(monkeypatch: pytest.MonkeyPatch) -> None:
    remember_captures(monkeypatch)


def attentions(text: Tensor, **options: Any) -> list[Tensor]:
    """What transformers' eager attention pays in each layer, `[heads, S, S]`."""
    eager: Any = copy.deepcopy(llama(2, **options))
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        found = eager(text, output_attentions=True).attentions
    return [layer[0] for layer in found]


def expected_scores(ids: Tensor, asked: tuple[int, ...] = ASKED) -> list[Tensor]:
    """The largest attention of the second reading to each token of the first, `[kv_heads, S]` of each layer."""
    tokens = ids.shape[1]
    text = torch.cat((ids, torch.tensor([asked], dtype=torch.int64), ids), 1)
    second = slice(tokens + len(asked), None)
    return [layer[:, second, :tokens].amax(1).view(2, -1, tokens).amax(1) for layer in attentions(text)]


def budgeted(capacity: int, eviction: str = "append", recent: int = 4, **options: Any) -> Any:
    policy = Policy("reconstruction", {**OPTIONS, **options}, eviction, recent)  # type: ignore[arg-type]
    return xkv_fx.transform(model(), Budgets((capacity,) * 2, policy), backend="eager", max_new_tokens=8)


def feed(llm: Any, *pieces: Tensor) -> Any:
    session = llm.new_session()
    for ids in pieces:
        session.session.feed(ids)
    return session


def kept(session: Any, layer: int) -> list[set[int]]:
    return [set(head[head >= 0].tolist()) for head in session.kept_positions(layer)[0]]


def best(scores: Tensor, capacity: int, recent: int = 4) -> list[set[int]]:
    tokens = scores.shape[1]
    old = scores[:, : tokens - recent].topk(capacity - recent).indices
    return [{*head.tolist(), *range(tokens - recent, tokens)} for head in old]


def test_what_is_kept_is_what_the_second_reading_looks_at() -> None:
    session = feed(budgeted(16), IDS)
    for layer, scores in enumerate(expected_scores(IDS)):
        assert kept(session, layer) == best(scores, 16)
    assert session.tokens_seen.tolist() == [IDS.shape[1]]


def test_scores_of_planning_are_the_same() -> None:
    cut = cut_model(captured("llama", 2, 1))
    found = scores_of_second_reading(cut, Reconstruction(instruction="5 9 7"), Reading(ASKED, 2048), IDS)
    for scores, expected in zip(found.values(), expected_scores(IDS), strict=True):
        torch.testing.assert_close(scores[0], expected, rtol=0, atol=1e-5)


def test_a_second_reading_changes_no_answer() -> None:
    """With room for everything, tokens and logits are the model's."""
    llm = budgeted(64)
    for all_logits in (False, True):
        logits = llm.new_session().session.feed(IDS, all_logits=all_logits)
        expected = model()(IDS).logits
        torch.testing.assert_close(logits, expected if all_logits else expected[:, -1:], rtol=0, atol=1e-4)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(llm.generate(IDS, **options), model().generate(IDS, **options))


@pytest.mark.parametrize("eviction", ["ring", "append"])
def test_pieces_and_turns_keep_the_scores_that_they_had(eviction: str) -> None:
    """A second piece is read again behind the first, which is there in full; each token has its largest attention."""
    first, second = IDS[:, :24], IDS[:, 24:]
    text = torch.cat((IDS, torch.tensor([ASKED]), second), 1)
    earlier = expected_scores(first)
    for layer, paid in enumerate(attentions(text)):
        later = paid[:, IDS.shape[1] + len(ASKED) :, : IDS.shape[1]].amax(1).view(2, -1, IDS.shape[1]).amax(1)
        later[:, :24] = torch.maximum(later[:, :24], earlier[layer])
        session = feed(budgeted(40, eviction), first, second)
        held = session.session.state.of(session.session.program.plan.caches[layer])["scores"][0]
        order = session.kept_positions(layer)[0]
        torch.testing.assert_close(held.gather(1, order.argsort(1)[:, -40:]), later, rtol=0, atol=1e-5)
    by_option = feed(budgeted(16, eviction, chunk=24), IDS)
    in_turns = feed(budgeted(16, eviction), first, second)
    for layer in range(2):
        assert kept(by_option, layer) == kept(in_turns, layer)


def test_pieces_of_planning() -> None:
    cut = cut_model(captured("llama", 2, 1))
    scorer = Reconstruction(chunk=24, instruction="5 9 7")
    found = scores_of_second_reading(cut, scorer, scorer.reading, IDS)
    session = feed(budgeted(40, chunk=24), IDS)
    for layer, scores in found.items():
        held = session.session.state.of(session.session.program.plan.caches[layer])["scores"][0]
        order = session.kept_positions(layer)[0]
        torch.testing.assert_close(held.gather(1, order.argsort(1)[:, -40:]), scores[0], rtol=0, atol=1e-5)


def test_generated_tokens_have_no_score_of_their_own() -> None:
    llm = budgeted(16, "ring")
    session = feed(llm, IDS)
    for token in range(6):
        session.session.step(torch.tensor([[token]]))
    session.session.feed(IDS[:, :8])
    assert session.tokens_seen.tolist() == [IDS.shape[1] + 14]
    assert all(len(head) == 16 for head in kept(session, 0))


def test_rows_of_other_lengths_keep_what_they_keep_alone() -> None:
    policy = Policy("reconstruction", OPTIONS, "append", 4)
    llm = xkv_fx.transform(model(), Budgets((16,) * 2, policy), batch_size=3, backend="eager", max_new_tokens=4)
    valid = torch.ones(3, 40, dtype=torch.bool)
    valid[1, :9] = False
    valid[2] = False
    session = llm.new_session()
    session.session.feed(IDS.expand(3, -1), valid=valid)
    alone = feed(budgeted(16), IDS[:, 9:])
    whole = feed(budgeted(16), IDS)
    for layer in range(2):
        rows = session.kept_positions(layer)
        assert [set(head[head >= 0].tolist()) for head in rows[0]] == kept(whole, layer)
        assert [set(head[head >= 0].tolist()) for head in rows[1]] == kept(alone, layer)
        assert (rows[2] == -1).all()


def test_a_profile_and_a_calibration_use_the_same_scores() -> None:
    policy = Policy("reconstruction", OPTIONS, "append", 4)
    profile = xkv_fx.profile(model(), [IDS], policy=policy)
    (curves,) = profile.curves
    for layer, scores in enumerate(expected_scores(IDS)):
        mass = sum(scores[head][list(chosen)].sum() for head, chosen in enumerate(best(scores, 16)))
        assert curves[layer][16] == pytest.approx(float(mass / scores.sum()), abs=1e-4)
    calibration = xkv_fx.calibrate(model(), [IDS], policy=policy, continuation=6)
    assert calibration.policy == policy
    with pytest.raises(BudgetError, match="of prompts that are read once"):
        xkv_fx.profile(model(), [IDS], policy=policy, statistics=("preference",))


def test_formats_go_with_it() -> None:
    policy = Policy("reconstruction", OPTIONS, "append", 4)
    plan = Budgets((16,) * 2, policy, formats=(("int8", "int4"), None))
    llm = xkv_fx.transform(model(), plan, backend="eager", max_new_tokens=8)
    assert kept(feed(llm, IDS), 1) == kept(feed(budgeted(16), IDS), 1)
    assert llm.generate(IDS, max_new_tokens=4).shape == (1, 44)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"chunk": 0}, "chunk must be"), ({"instruction": "Repeat:"}, "instruction must be token ids")],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        budgeted(16, **options)


def test_what_it_does_not_go_with() -> None:
    with pytest.raises(BudgetError, match="eviction='scored'"):
        budgeted(16, "scored")
    long = random_ids(1, model().config.max_position_embeddings // 2 + 1)
    with pytest.raises(PromptError, match="second reading of these tokens would end at position"):
        feed(budgeted(16), long)
    session = feed(budgeted(16, chunk=32), long)
    assert session.tokens_seen.tolist() == [long.shape[1]]

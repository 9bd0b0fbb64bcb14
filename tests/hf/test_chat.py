"""Conversations in a session: what is fed is what the template writes, and each answer is the one to all of it."""

from __future__ import annotations

import pytest
import torch
from chat_tokenizer import END, ChatTokenizer
from ready_models import FULL, full, transformed

from xkv_fx import Budgets
from xkv_fx.errors import CapacityError, PromptError
from xkv_fx.hf.chat import Conversation, held_shares
from xkv_fx.hf.chat_template import chat_ids
from xkv_fx.hf.generation import BudgetedLM
from xkv_fx.runtime.choose_tokens import likeliest

TOKENIZER = ChatTokenizer()


def conversation(llm: BudgetedLM, system: str | None = None, ends: tuple[int, ...] = (END,)) -> Conversation:
    return Conversation(llm.new_session(), TOKENIZER, ends, likeliest, system)


@pytest.mark.parametrize("system", [None, "be"])
def test_answers_are_those_to_the_whole_conversation(system: str | None) -> None:
    chat = conversation(full(), system)
    messages = [] if system is None else [{"role": "system", "content": system}]
    for said in ("ab", "c", "de"):
        shown: list[str] = []
        turn = chat.say(said, 6, shown.append)
        messages.append({"role": "user", "content": said})
        prompt = chat_ids(TOKENIZER, messages)
        expected = full().generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=END)
        assert chat.ids == expected[0].tolist()
        assert "".join(shown) == turn.text
        assert turn.reason == "length"
        assert turn.tokens == 6
        messages.append({"role": "assistant", "content": TOKENIZER.decode(chat.ids[len(prompt) :])})


def test_an_answer_that_ends_itself_is_not_ended_twice() -> None:
    free = conversation(full())
    free.say("ab", 9)
    third = free.ids[-7]

    class EndsEarly(ChatTokenizer):
        """Its messages end with the token that the model says third."""

        def apply_chat_template(self, messages, tokenize=True, add_generation_prompt=False):  # type: ignore[no-untyped-def]
            text = super().apply_chat_template(messages, tokenize, add_generation_prompt)
            return text.replace("#", self.decode([third])) if len(messages) > 2 else text

    chat = Conversation(full().new_session(), EndsEarly(), (third,), likeliest)
    turn = chat.say("ab", 9)
    assert turn.reason == "end"
    assert chat.ids == free.ids[: len(chat.ids)]
    assert TOKENIZER.decode(chat.ids[len(chat.ids) - turn.tokens : -1]) == turn.text
    before = len(chat.ids)
    chat.say("c", 1)
    assert TOKENIZER.decode(chat.ids[before:-1]) == f"\nu:c{TOKENIZER.decode([third])}\na:"


def test_it_goes_on_and_on_in_the_same_memory() -> None:
    chat = conversation(transformed(Budgets((12, 17))))
    bytes_held = chat.session.kv_bytes
    for _ in range(6):
        chat.say("hello there", 7)
    held = chat.held()
    assert chat.session.kv_bytes == bytes_held
    assert len(held) == len(chat.ids) - 1  # the last token is fed with the next turn
    assert float(held.sum()) == pytest.approx((2 * 12 + 2 * 17) / 4)
    assert int((held == 0).sum()) > len(held) / 2
    for layer, capacity in enumerate((12, 17)):
        kept = chat.session.kept_positions(layer)[0]
        assert kept.shape[1] == capacity
        assert bool((held[kept.flatten()] > 0).all())
    chat.forget()
    assert chat.ids == []
    assert len(chat.held()) == 0
    assert chat.say("ab", 5) == conversation(transformed(Budgets((12, 17)))).say("ab", 5)


@pytest.mark.parametrize("budgets", [Budgets((12, 17)), Budgets(((9, 13), 17))], ids=["by layer", "by head"])
def test_shares_are_counted_slot_by_slot(budgets: Budgets) -> None:
    session = transformed(budgets, rows=2).new_session()
    ids = torch.arange(1, 41)[None].repeat(2, 1)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, :35] = False
    session.feed(ids, None, valid, False)
    shares = held_shares(session)
    for row in range(2):
        for token in range(40):
            heads = [list(head) for layer in range(2) for head in session.kept_positions(layer)[row].tolist()]
            assert float(shares[row, token]) == pytest.approx(sum(token in head for head in heads) / len(heads))


def test_an_answer_can_be_stopped() -> None:
    chat, shown = conversation(full()), []
    turn = chat.say("ab", 20, shown.append, lambda: len(shown) == 3)
    assert turn.reason == "stopped"
    assert turn.tokens == 3
    again = conversation(full())
    again.say("ab", 3)
    assert chat.say("c", 4) == again.say("c", 4)


def test_without_room_nothing_is_fed() -> None:
    chat = conversation(full())
    chat.say("ab", 5)
    before = list(chat.ids)
    with pytest.raises(CapacityError, match="tokens"):
        chat.say("x" * 20, FULL)
    assert chat.ids == before
    assert chat.say("c", 5).tokens == 5


def test_templates_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(ChatTokenizer):
        def apply_chat_template(self, messages, tokenize=True, add_generation_prompt=False):  # type: ignore[no-untyped-def]
            return super().apply_chat_template(messages[-1:], tokenize, add_generation_prompt)

    chat = Conversation(full().new_session(), Forgetful(), (END,), likeliest)
    chat.say("ab", 2)
    with pytest.raises(PromptError, match="leaves earlier answers out"):
        chat.say("c", 2)
    with pytest.raises(PromptError, match=r"refuses these messages: roles must alternate$"):
        chat_ids(TOKENIZER, [{"role": "user", "content": "a"}] * 2)
    monkeypatch.setattr(TOKENIZER, "chat_template", None)
    with pytest.raises(PromptError, match=r"no chat template.*take an instruct or chat model"):
        conversation(full())

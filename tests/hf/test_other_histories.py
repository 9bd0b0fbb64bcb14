"""A session that is given a conversation, or a mask, other than what it was fed: refused by name, before anything is
fed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from ready_models import full, model, transformed
from tiny_models import random_ids
from torch import Tensor

from xkv_fx import Budgets
from xkv_fx.errors import PromptError, SessionError
from xkv_fx.hf.cache import SessionCache
from xkv_fx.hf.cache_name import CHUNKS_HOLD_NEW_TOKENS
from xkv_fx.hf.generation import BudgetedLM

FILES = Path(__file__).parent.parent / "files_of_0_1"
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4}


def ones(ids: Tensor) -> Tensor:
    return torch.ones_like(ids)


def chatted(llm: BudgetedLM, rows: int = 1) -> tuple[SessionCache, Tensor]:
    """A session that holds 9 columns and 3 of the 4 generated ones, and the text so far, with 5 new ones behind."""
    session = llm.new_session()
    text = llm.generate(
        random_ids(rows, 9), attention_mask=ones(random_ids(rows, 9)), past_key_values=session, **GREEDY
    )
    return session, torch.cat((text, random_ids(rows, 5, seed=7)), 1)


def changed(text: Tensor, column: int, row: int = 0) -> Tensor:
    text = text.clone()
    text[row, column] = text[row, column] % 50 + 1
    return text


def refused(llm: BudgetedLM, session: SessionCache, message: str, text: Tensor, mask: Tensor, **more: Any) -> None:
    before = session.tokens_seen.tolist()
    with pytest.raises(SessionError, match=message):
        llm.generate(text, attention_mask=mask, past_key_values=session, **GREEDY, **more)
    assert session.tokens_seen.tolist() == before


@pytest.mark.parametrize("chunk", [None, 3])
def test_another_conversation_is_refused(chunk: int | None) -> None:
    """At the first column that differs, of whichever row, be it of the prompt or of what was generated."""
    if chunk and not CHUNKS_HOLD_NEW_TOKENS:
        pytest.skip("this version of transformers feeds a conversation from its start again")
    llm = full(rows=2)
    session, text = chatted(llm, rows=2)
    for column, row in ((0, 0), (8, 1), (11, 0)):
        other = changed(text, column, row)
        message = (
            f"holds another conversation: column {column} of row {row} was fed as the token {text[row, column]}, "
            f"and is {other[row, column]} in the conversation given"
        )
        refused(llm, session, message, changed(other, 11, row=1), ones(text), prefill_chunk_size=chunk)
    last = changed(text, 12)  # the last token that was generated has not been fed yet: it may be another
    got = llm.generate(last, attention_mask=ones(text), past_key_values=session, prefill_chunk_size=chunk, **GREEDY)
    assert torch.equal(got, model().generate(last, attention_mask=ones(text), **GREEDY))


def test_a_prompt_longer_than_the_session_is_no_turn() -> None:
    llm = transformed(Budgets((12, 17)))
    session, _ = chatted(llm)
    refused(llm, session, "column 0 of row 0 was fed", random_ids(1, 30, seed=5), ones(random_ids(1, 30)))
    session.reset()
    assert llm.generate(random_ids(1, 30, seed=5), past_key_values=session, **GREEDY).shape == (1, 34)


def test_a_shorter_conversation_says_what_it_is() -> None:
    llm = full()
    session, text = chatted(llm)
    with pytest.raises(PromptError, match="holds 12 tokens a row, and the conversation given has 5: nothing in it is"):
        llm.generate(text[:, -5:], attention_mask=ones(text[:, -5:]), past_key_values=session, **GREEDY)


def test_a_row_that_ended_and_is_masked_in_the_next_turn() -> None:
    """Filler was fed as tokens of its row: transformers' answer would be one without them."""
    llm, ids = full(rows=2), random_ids(2, 12)
    end = int(model().generate(ids, do_sample=False, max_new_tokens=3)[0, -1])
    session = llm.new_session()
    ended = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": end, "pad_token_id": 0}
    text = llm.generate(ids, attention_mask=ones(ids), past_key_values=session, **ended)
    filler = int((text[0] == 0).int().argmax())
    text = torch.cat((text, ids[:, :6]), 1)
    refused(
        llm,
        session,
        f"the attention mask says that column {filler} of row 0 is padding, and it was fed as the token 0.*Rows that "
        "ended while others went on",
        text,
        (text != 0).long(),
    )
    assert llm.generate(text, attention_mask=ones(text), past_key_values=session, **GREEDY).shape == (2, 32)


def test_padding_that_the_mask_forgets() -> None:
    llm, ids = full(rows=2), random_ids(2, 9)
    mask = ones(ids)
    mask[1, :3] = 0
    session = llm.new_session()
    text = llm.generate(ids, attention_mask=mask, past_key_values=session, **GREEDY)
    refused(
        llm, session, "column 0 of row 1 is a token by the attention mask, and was fed as padding", text, ones(text)
    )
    mask = torch.cat((mask, ones(text[:, 9:])), 1)
    other = changed(text, 1, row=1)  # what stands under padding is no matter
    assert llm.generate(other, attention_mask=mask, past_key_values=session, **GREEDY).shape == (2, 17)


def test_only_what_is_new_with_the_mask_of_all() -> None:
    llm = full()
    session, text = chatted(llm)
    new, mask = text[:, 12:], ones(text)
    refused(llm, session, "column 4 of row 0 is padding", new, mask.index_fill(1, torch.tensor([4]), 0))
    with pytest.raises(PromptError, match=r"got 3 tokens a row and an attention mask of 18 columns .* that holds 12"):
        llm.generate(new[:, :3], attention_mask=mask, past_key_values=session, **GREEDY)
    with pytest.raises(PromptError, match=r"got 5 tokens a row and an attention mask of 9 columns .* that holds 0"):
        llm.generate(random_ids(1, 5), attention_mask=ones(random_ids(1, 9)), **GREEDY)
    got = llm.generate(new, attention_mask=mask, past_key_values=session, **GREEDY)
    assert torch.equal(got[:, 6:], model().generate(text, **GREEDY)[:, 18:])


def test_masks_of_forward() -> None:
    """Over the new tokens, or over all columns; a decoded token is none of padding."""
    llm = full()
    session, text = chatted(llm)
    mask = ones(text)
    with pytest.raises(SessionError, match="column 2 of row 0 is padding"):
        llm(text[:, 12:], attention_mask=mask.index_fill(1, torch.tensor([2]), 0), past_key_values=session)
    with pytest.raises(
        PromptError, match=r"the attention mask has 8 columns; give it 6, for the new .* or 18, for all"
    ):
        llm(text[:, 12:], attention_mask=mask[:, :8], past_key_values=session)
    with pytest.raises(PromptError, match="padding for its next token"):
        llm(text[:, :1], attention_mask=torch.zeros(1, 1), past_key_values=session, decoding=True)
    assert session.tokens_seen.tolist() == [12]
    twin = session.fork()
    logits = [
        llm(text[:, 12:], attention_mask=given, past_key_values=held).logits
        for given, held in ((mask, session), (mask[:, 12:], twin))
    ]
    assert torch.equal(*logits)


def test_histories_follow_forks_beams_resets_and_files(tmp_path: Path) -> None:
    llm = full(rows=2)
    session, text = chatted(llm, rows=2)
    fork, copied = session.fork(), copy.deepcopy(session)
    session.step(torch.tensor([[3], [4]]), None)
    for kept in (fork, copied):
        refused(llm, kept, "column 10 of row 1", changed(text, 10, row=1), ones(text))
        assert llm.generate(text, attention_mask=ones(text), past_key_values=kept, **GREEDY).shape == (2, 22)
    refused(llm, session, "column 12 of row 0 was fed as the token 3", text, ones(text))

    session.save(tmp_path / "session")
    read = llm.new_session()
    read.load(tmp_path / "session")
    refused(llm, read, "column 12 of row 0 was fed as the token 3", text, ones(text))

    session.reorder_cache(torch.tensor([1, 1]))
    swapped = torch.cat((text[[1, 1], :12], torch.full((2, 1), 4), text[:, 13:]), 1)
    refused(llm, session, "column 0 of row 0", torch.cat((text[:, :12], swapped[:, 12:]), 1), ones(text))
    assert llm.generate(swapped, attention_mask=ones(text), past_key_values=session, **GREEDY).shape == (2, 22)

    read.reset_rows([0])
    mask = ones(text)
    text[:, 12] = torch.tensor([3, 4])
    refused(
        llm, read, "column 0 of row 0 is a token by the attention mask, and was .* forgotten by reset_rows", text, mask
    )
    mask[0, :13] = 0
    assert llm.generate(text, attention_mask=mask, past_key_values=read, **GREEDY).shape == (2, 22)
    read.reset()
    assert llm.generate(text[:, ::2], attention_mask=ones(text[:, ::2]), past_key_values=read, **GREEDY).shape == (
        2,
        13,
    )


def test_a_beams_session_holds_what_its_rows_were_fed() -> None:
    llm = full(rows=2)
    session = llm.new_session()
    llm.generate(random_ids(1, 9), past_key_values=session, num_beams=2, **GREEDY)
    held = session.session.transcript.ids.long()
    text = torch.cat((held, random_ids(2, 3, seed=4)), 1)
    refused(llm, session.fork(), "column 0 of row 1", changed(text, 0, row=1), ones(text))
    got = llm.generate(text, attention_mask=ones(text), past_key_values=session, **GREEDY)
    assert torch.equal(got, model().generate(text, attention_mask=ones(text), **GREEDY))


def test_a_session_of_an_older_file_has_no_ids_to_compare(tmp_path: Path) -> None:
    """What it is fed from then on is compared, also once it was saved again."""
    llm = transformed(Budgets((12, 16)))
    session = llm.new_session()
    session.load(FILES / "session_ring.safetensors")
    assert session.fed == 22
    text = llm.generate(random_ids(1, 25), past_key_values=session, **GREEDY)
    session.save(tmp_path / "again")
    again = llm.new_session()
    again.load(tmp_path / "again")
    text = torch.cat((text, random_ids(1, 2)), 1)
    for kept in (session, again):
        refused(llm, kept, "column 23 of row 0", changed(text, 23), ones(text))
        assert llm.generate(changed(text, 21), attention_mask=ones(text), past_key_values=kept, **GREEDY).shape == (
            1,
            35,
        )


def test_ids_are_kept_without_waiting_for_the_device_and_in_little_memory() -> None:
    llm = transformed(Budgets((12, 17)))
    session = llm.new_session()
    session.feed(random_ids(1, 9), None, None, False)
    token = torch.tensor([[5]])
    for step in range(200):
        token.fill_(step % 60)
        session.step(token, None)
    ids = session.session.transcript.ids
    assert ids.dtype == torch.int32
    assert ids[0, 9:].tolist() == [step % 60 for step in range(200)], "the caller's tensor may be used again"
    assert ids.untyped_storage().nbytes() <= 2 * 4 * session.fed

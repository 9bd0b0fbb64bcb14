"""Sessions as users handle them: rows filled again one by one, caches kept in files, eviction by score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ready_models
import torch
from safetensors.torch import load_file, save_file
from tiny_models import llama, random_ids

import xkv_fx
from xkv_fx.errors import FileFormatError, PromptError, SessionError

POLICIES = [
    xkv_fx.Policy(),
    xkv_fx.Policy(eviction="scored", sinks=2),
    xkv_fx.Policy(eviction="append"),
]
CAPACITIES = (20, 33)
ROOM = 64


def transformed(policy: xkv_fx.Policy, rows: int = 1, capacities: tuple[int, ...] = CAPACITIES) -> Any:
    return ready_models.transformed(xkv_fx.Budgets(capacities, policy), rows, max_new_tokens=ROOM)


def decode(llm: Any, session: Any, tokens: torch.Tensor) -> torch.Tensor:
    steps = [llm(token, past_key_values=session, decoding=True).logits for token in torch.split(tokens, 1, dim=1)]
    return torch.cat(steps, 1)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.eviction)
def test_a_row_is_filled_again_while_the_others_go_on(policy: xkv_fx.Policy) -> None:
    llm, alone = transformed(policy, rows=2), transformed(policy)
    first, second, third = (random_ids(1, 40, seed) for seed in (1, 2, 3))
    tokens = random_ids(2, 12, seed=4)

    session = llm.new_session()
    llm(torch.cat((first, second)), past_key_values=session, logits_to_keep=1)
    decode(llm, session, tokens)
    session.reset_rows([1])
    mask = torch.tensor([[0] * 40, [1] * 40])
    refilled = llm(torch.cat((third, third)), attention_mask=mask, past_key_values=session, logits_to_keep=1).logits
    after = decode(llm, session, tokens)

    went_on, began = alone.new_session(), alone.new_session()
    alone(first, past_key_values=went_on, logits_to_keep=1)
    decode(alone, went_on, tokens[:1])
    expected = alone(third, past_key_values=began, logits_to_keep=1).logits
    torch.testing.assert_close(refilled[1:], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(after[:1], decode(alone, went_on, tokens[:1]), atol=1e-4, rtol=0)
    torch.testing.assert_close(after[1:], decode(alone, began, tokens[1:]), atol=1e-4, rtol=0)
    assert session.tokens_seen.tolist() == [40 + 12 + 12, 40 + 12]


def test_only_rows_that_exist_are_reset() -> None:
    with pytest.raises(PromptError, match="no row 1"):
        transformed(POLICIES[0]).new_session().reset_rows([1])


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.eviction)
def test_a_saved_session_goes_on(policy: xkv_fx.Policy, tmp_path: Path) -> None:
    llm = transformed(policy)
    session, restored = llm.new_session(), llm.new_session()
    llm(random_ids(1, 40), past_key_values=session, logits_to_keep=1)
    decode(llm, session, random_ids(1, 9, seed=1))
    session.save(tmp_path / "session.safetensors")
    restored.load(tmp_path / "session.safetensors")
    assert restored.get_seq_length() == session.get_seq_length() == 49
    tokens = random_ids(1, 20, seed=2)
    assert torch.equal(decode(llm, restored, tokens), decode(llm, session, tokens))


def test_a_session_of_other_budgets_is_refused_and_the_session_stays_usable(tmp_path: Path) -> None:
    llm, other = transformed(POLICIES[0]), transformed(POLICIES[0], capacities=(20, 34))
    session = llm.new_session()
    llm(random_ids(1, 40), past_key_values=session, logits_to_keep=1)
    other.new_session().save(tmp_path / "other.safetensors")
    before = [tensor.clone() for tensor in session.session.state.tensors]
    with pytest.raises(SessionError, match="other budgets"):
        session.load(tmp_path / "other.safetensors")
    assert all(map(torch.equal, session.session.state.tensors, before))
    decode(llm, session, random_ids(1, 2))


def test_a_damaged_session_file_is_refused(tmp_path: Path) -> None:
    llm = transformed(POLICIES[0])
    session = llm.new_session()
    llm(random_ids(1, 40), past_key_values=session, logits_to_keep=1)
    path = tmp_path / "session.safetensors"
    session.save(path)
    whole = path.read_bytes()
    written_as = {version: {"xkv_fx": json.dumps({**_header(path), "version": version})} for version in (1, 4)}
    for cut in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(FileFormatError, match=r"session\.safetensors"):
            session.load(path)
    path.write_bytes(whole)
    tensors = load_file(path)
    for version, what in ((1, "older than 2"), (4, "newer than 3")):
        save_file(tensors, path, written_as[version])
        with pytest.raises(FileFormatError, match=what):
            session.load(path)
    path.write_bytes(whole)
    good = {"xkv_fx": json.dumps(_header(path))}
    for name, value in (("seen", -1), ("positions_0", 10_000), ("k_1", float("nan"))):
        save_file({**tensors, name: torch.full_like(tensors[name], value)}, path, good)
        with pytest.raises(FileFormatError):
            session.load(path)
    ids = tensors["fed_ids"]
    for wrong, message in (
        (ids.long(), "not int32 of 1 rows and at most 40 columns, from -1 on"),
        (torch.cat((ids, ids), 1), "at most 40 columns"),
        (ids - 70, "from -1 on"),
        (ids[:, 0], "at most 40 columns"),
        (torch.where(torch.arange(40) < 3, -1, ids), "fed_ids contradicts the counters"),
        (ids + 1, "does not match its checksum"),
    ):
        save_file({**tensors, "fed_ids": wrong}, path, good)
        with pytest.raises(FileFormatError, match=message):
            session.load(path)
    assert session.get_seq_length() == 40


def _header(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header: dict[str, Any] = json.loads(json.loads(raw[8 : 8 + size])["__metadata__"]["xkv_fx"])
    return header


def test_scored_eviction_drops_the_least_attended_token_outside_recent_and_sinks() -> None:
    """Every step is derived again from the scores before it."""
    llm = transformed(xkv_fx.Policy(eviction="scored", recent=4, sinks=2), capacities=(12, 15))
    session = llm.new_session()
    llm(random_ids(1, 30), past_key_values=session, logits_to_keep=1)
    for step in range(40):
        state = session.session.state
        before = [(state[f"positions_{layer}"].clone(), state[f"scores_{layer}"].clone()) for layer in range(2)]
        decode(llm, session, random_ids(1, 1, seed=step))
        seen = 30 + step
        for layer, (positions, scores) in enumerate(before):
            for head in range(positions.shape[1]):
                candidates = [
                    (float(score), int(position))
                    for position, score in zip(positions[0, head], scores[0, head], strict=True)
                    if 2 <= position <= seen - 4
                ]
                gone = min(candidates)[1]
                kept = sorted({*positions[0, head].tolist(), seen} - {gone})
                assert session.kept_positions(layer)[0, head].sort().values.tolist() == kept


def test_scored_eviction_is_exact_while_everything_fits() -> None:
    model = llama()
    llm = xkv_fx.transform(model, xkv_fx.Budgets((90, 90), xkv_fx.Policy(eviction="scored")), backend="eager")
    ids = random_ids(1, 30)
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(llm.generate(ids, **options), model.generate(ids, **options))

"""Hybrids: layers that mix tokens by a state of fixed size, carried along beside the planned caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hybrid_models
import pytest
import torch
from batches import padded
from by_hand import default_recent, survivors
from hybrid_models import FAMILIES, ForgettingModel, feed, kept_by, logits_of, step, tokens, transformed
from ready_models import FULL
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import Snapshot
from torch import Tensor

import xkv_fx
from xkv_fx import Budgets, Policy
from xkv_fx.errors import FileFormatError, SessionError, UnsupportedModelError
from xkv_fx.evaluation.coverage.tiny import registered, tiny_model
from xkv_fx.hf.cache_name import CACHE_NAME
from xkv_fx.hf.capture import capture
from xkv_fx.layers import LayerSpec

EXACT = 1e-4
LONG = 5e-4  # of 200 tokens, where transformers' own cached logits stray by up to 1e-4 from those without a cache
GREEDY: dict[str, Any] = {
    "do_sample": False, "return_dict_in_generate": True, "output_logits": True, "use_cache": True, "num_beams": 1,
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def close(ours: Tensor, theirs: Tensor, limit: float = EXACT) -> None:
    torch.testing.assert_close(ours, theirs, atol=limit, rtol=0)


# At full budgets everything is exact


def test_the_model_is_left_as_it_was() -> None:
    family = "zaya"
    source = hybrid_models.model(family)
    snapshot = Snapshot.of(source)
    capture(source, decode=False, check=False)
    snapshot.assert_unchanged()


@pytest.mark.parametrize("length", [1, 5, 40])
def test_generate_as_transformers_does(family: str, length: int) -> None:
    ids = tokens(1, length)
    options = {**GREEDY, "attention_mask": torch.ones_like(ids), "max_new_tokens": 16}
    expected = hybrid_models.model(family).generate(ids, **options)
    got = transformed(family).generate(ids, **options)
    assert torch.equal(got.sequences, expected.sequences)
    close(torch.cat(got.logits), torch.cat(expected.logits))


@pytest.mark.parametrize("family", ["qwen3_next", "nemotron_h"])
def test_prompts_of_several_chunks_of_the_models_scan(family: str) -> None:
    count = len(hybrid_models.captured(family).layers)
    llm = transformed(family, Budgets.full(count, 256))
    ids = tokens(1, 203)
    session = llm.new_session()
    whole = logits_of(family, ids)
    close(feed(llm, session, ids[:, :130]), whole[:, :130], LONG)
    close(feed(llm, session, ids[:, 130:200]), whole[:, 130:200], LONG)
    close(step(llm, session, ids[:, 200:201]), whole[:, 200:201], LONG)


def test_a_conversation_of_turns_and_decoded_tokens(family: str) -> None:
    llm = transformed(family)
    ids = tokens(1, 40)
    whole, session = logits_of(family, ids), llm.new_session()
    close(feed(llm, session, ids[:, :9]), whole[:, :9])
    for token in range(9, 13):
        close(step(llm, session, ids[:, token : token + 1]), whole[:, token : token + 1])
    for start, stop in ((13, 14), (14, 30), (30, 32)):
        close(feed(llm, session, ids[:, start:stop]), whole[:, start:stop])
    for token in range(32, 40):
        close(step(llm, session, ids[:, token : token + 1]), whole[:, token : token + 1])


def test_padding_does_not_move_a_state(family: str) -> None:
    side = "right" if family in ("nemotron_h", "zaya") else "left"
    llm, session = transformed(family, rows=3), transformed(family, rows=3).new_session()
    rows = [tokens(1, length, seed=length) for length in (30, 22, 27)]
    whole = [logits_of(family, row) for row in rows]
    seen = [0, 0, 0]

    def fed(counts: tuple[int, int, int]) -> None:
        parts = [row[:, start : start + count] for row, start, count in zip(rows, seen, counts, strict=True)]
        ids, valid = padded(parts, side, fill=7)
        logits = feed(llm, session, ids, valid)
        for row, count in enumerate(counts):
            close(logits[row][valid[row]], whole[row][0, seen[row] : seen[row] + count])
            seen[row] += count

    def decoded() -> None:
        ids = torch.cat([row[:, place : place + 1] for row, place in zip(rows, seen, strict=True)])
        logits = step(llm, session, ids)
        for row in range(3):
            close(logits[row], whole[row][0, seen[row] : seen[row] + 1])
            seen[row] += 1

    fed((11, 5, 8))
    decoded()
    decoded()
    fed((3, 0, 6))  # a row without new tokens stays as it is
    decoded()
    fed((1, 7, 2))
    decoded()


@pytest.mark.parametrize("family", ["qwen3_next", "jamba"])
def test_rows_are_filled_again_while_others_go_on(family: str) -> None:
    llm, session = transformed(family, rows=3), transformed(family, rows=3).new_session()
    first, again = tokens(3, 20), tokens(1, 12, seed=5)
    whole, other = logits_of(family, first), logits_of(family, again)
    feed(llm, session, first[:, :10])
    session.reset_rows([1])
    valid = torch.tensor([[False], [True], [False]]).expand(3, 8)
    logits = feed(llm, session, again[:, :8].expand(3, 8), valid)
    close(logits[1], other[0, :8])
    for token in range(4):
        ids = first[:, 10 + token : 11 + token].clone()
        ids[1] = again[:, 8 + token]
        logits = step(llm, session, ids)
        close(logits[[0, 2]], whole[[0, 2], 10 + token : 11 + token])
        close(logits[1], other[0, 8 + token : 9 + token])


@pytest.mark.parametrize("family", ["qwen3_next"])
def test_beams_take_their_states_along(family: str) -> None:
    ids = tokens(1, 15)
    options = {"max_new_tokens": 10, "num_beams": 3, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = hybrid_models.model(family).generate(ids, **options)
    assert torch.equal(transformed(family, rows=3).generate(ids, **options), expected)


@pytest.mark.parametrize("family", ["lfm2_moe"])
def test_forks_are_independent(family: str) -> None:
    llm, ids = transformed(family), tokens(1, 24)
    other = torch.cat((ids[:, :12], tokens(1, 12, seed=9)), 1)
    session = llm.new_session()
    feed(llm, session, ids[:, :12])
    twin = session.fork()
    close(feed(llm, session, ids[:, 12:]), logits_of(family, ids)[:, 12:])
    close(step(llm, twin, other[:, 12:13]), logits_of(family, other)[:, 12:13])
    close(feed(llm, twin, other[:, 13:]), logits_of(family, other)[:, 13:])


@pytest.mark.parametrize("family", ["qwen3_next"])
def test_a_prompt_in_chunks(family: str) -> None:
    ids = tokens(1, 40)
    options = {**GREEDY, "attention_mask": torch.ones_like(ids), "max_new_tokens": 8}
    expected = hybrid_models.model(family).generate(ids, **options)
    got = transformed(family).generate(ids, prefill_chunk_size=16, **options)
    assert torch.equal(got.sequences, expected.sequences)
    close(torch.cat(got.logits), torch.cat(expected.logits))


@pytest.mark.parametrize("family", ["qwen3_next"])
def test_generate_goes_on_with_a_session(family: str) -> None:
    llm, own = transformed(family), hybrid_models.model(family)
    session = llm.new_session()
    first = llm.generate(tokens(1, 12), max_new_tokens=6, do_sample=False, **{CACHE_NAME: session})
    conversation = torch.cat((first, tokens(1, 7, seed=3)), 1)
    expected = own.generate(conversation, max_new_tokens=8, do_sample=False)
    assert torch.equal(llm.generate(conversation, max_new_tokens=8, do_sample=False, **{CACHE_NAME: session}), expected)


def test_many_requests_through_few_rows() -> None:
    own = hybrid_models.model("lfm2_moe")
    llm = xkv_fx.transform(own, Budgets((FULL,)), batch_size=2, backend="eager", check=False)
    requests = [tokens(1, length, seed=length)[0] for length in (9, 4, 15, 6, 11)]
    answers = {answer.index: answer.ids for answer in llm.generate_many(requests, max_new_tokens=5)}
    for index, ids in enumerate(requests):
        expected = own.generate(ids[None], max_new_tokens=5, do_sample=False)[0, len(ids) :]
        assert list(answers[index]) == expected.tolist()


# Tight budgets


@pytest.mark.parametrize(
    ("family", "policy"),
    [
        *((family, Policy()) for family in FAMILIES),
        ("qwen3_next", Policy(eviction="append")),
        ("falcon_h1", Policy(eviction="scored")),
    ],
)
def test_tight_budgets_against_transformers_with_tokens_taken_away(family: str, policy: Policy) -> None:
    """Prompt, decoded tokens, a turn, and decoded tokens again. The capacities are equal, since transformers makes one
    mask for all layers."""
    count = len(hybrid_models.captured(family).layers)
    llm = transformed(family, Budgets((12,) * count, policy), max_new_tokens=16)
    ids = tokens(1, 60)
    oracle, session = ForgettingModel(family, ids[:, :30]), llm.new_session()
    feed(llm, session, ids[:, :30])
    place = 30
    for size in (1, 1, 1, 1, 9, 1, 1, 1):
        kept = kept_by(session)
        new = ids[:, place : place + size]
        if size > 1:
            close(feed(llm, session, new), oracle.feed(new, kept))
        else:
            ours = step(llm, session, new)
            now = kept_by(session)
            reached = [
                [sorted(set(head) & set(later)) for head, later in zip(*layers, strict=True)]
                for layers in zip(kept, now, strict=True)
            ]
            close(ours, oracle.feed(new, reached))
        place += size


READ_AGAIN = Policy(scorer="reconstruction", scorer_options={"instruction": "5 6"})


def test_a_second_reading_does_not_move_a_state() -> None:
    count = len(hybrid_models.captured("qwen3_next").layers)
    llm = transformed("qwen3_next", Budgets((FULL,) * count, READ_AGAIN))
    ids = tokens(1, 40)
    session, whole = llm.new_session(), logits_of("qwen3_next", ids)
    close(feed(llm, session, ids[:, :11]), whole[:, :11])
    close(step(llm, session, ids[:, 11:12]), whole[:, 11:12])
    close(feed(llm, session, ids[:, 12:30]), whole[:, 12:30])
    close(step(llm, session, ids[:, 30:31]), whole[:, 30:31])


def test_a_second_reading_sees_what_the_states_became() -> None:
    """Who survives, from the attention that transformers reports when it is fed both readings."""
    source = hybrid_models.model("qwen3_next")
    ids = tokens(1, 24)
    twice = torch.cat((ids, torch.tensor([[5, 6]]), ids), 1)
    with torch.no_grad():
        reported = source(twice, output_attentions=True, use_cache=False).attentions
    attentions = [weights[0] for weights in reported if weights is not None]
    llm = transformed("qwen3_next", Budgets((9,) * len(attentions), READ_AGAIN))
    session = llm.new_session()
    feed(llm, session, ids)
    for kept, weights in zip(kept_by(session), attentions, strict=True):
        paid = weights[:, 26:, :24].unflatten(0, (2, -1)).amax((1, 2))
        assert kept == survivors(paid, 9, default_recent(9))


# Bytes, files, refusals


def test_bytes_of_states_are_counted_apart() -> None:
    llm = transformed("qwen3_next", rows=3)
    session = llm.new_session()
    conv, recurrent = 3 * (2 * 2 * 8 + 4 * 8) * 4 * 4, 3 * 4 * 8 * 8 * 4
    assert llm.other_state_bytes == session.other_state_bytes == 2 * (conv + recurrent)
    assert llm.kv_bytes == session.kv_bytes == llm.budgets.kv_bytes(hybrid_models.model("qwen3_next"), 3)
    assert llm.state_bytes == session.state_bytes == 2 * 3 * 2 * FULL * 4 + 2 * 3 * 8
    assert f"other state   {llm.other_state_bytes:,} bytes a session, in 2 recurrent layers" in llm.describe()


def test_capture_knows_its_layers() -> None:
    found = hybrid_models.captured("falcon_h1")
    assert found.layers == (LayerSpec(4, 2, 8, 8, 4),) * 2
    assert [layer.path for layer in found.recurrences] == ["model.layers.0.mamba", "model.layers.1.mamba"]
    assert all(layer.goes_on for layer in found.recurrences)
    assert not hybrid_models.captured("jamba").recurrences[0].goes_on


def test_a_saved_session(tmp_path: Path) -> None:
    llm, ids = transformed("qwen3_next"), tokens(1, 24)
    session, other = llm.new_session(), llm.new_session()
    feed(llm, session, ids[:, :12])
    session.save(tmp_path / "session")
    other.load(tmp_path / "session")
    close(feed(llm, other, ids[:, 12:]), logits_of("qwen3_next", ids)[:, 12:])
    with pytest.raises(SessionError, match="a session of another model"):
        transformed("falcon_h1").new_session().load(tmp_path / "session")


def test_a_saved_session_with_a_damaged_state(tmp_path: Path) -> None:
    llm = transformed("qwen3_next")
    session = llm.new_session()
    feed(llm, session, tokens(1, 5))
    session.save(tmp_path / "session")
    with safe_open(tmp_path / "session", "pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = file.metadata()
    for name, changed, what in (
        ("recurrent_0", held["recurrent_0"] * float("nan"), "recurrent_0 holds numbers that are not finite"),
        ("conv_1", held["conv_1"][..., 1:], "conv_1 is torch.float32 of"),
        ("conv_1", held["conv_1"] + 1, "does not match its checksum"),
    ):
        save_file({**held, name: changed.contiguous()}, tmp_path / "damaged", header)
        with pytest.raises(FileFormatError, match=what):
            llm.new_session().load(tmp_path / "damaged")


ENTRIES = {entry.model_type: entry for entry in registered()}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mamba", "MambaForCausalLM has no attention: .* so there is nothing to budget"),
        ("rwkv", "RwkvForCausalLM has no attention: .* so there is nothing to budget"),
        ("recurrent_gemma", "keeps its recurrent states in another place|has 2 layers but 1 attentions"),
        ("minimax", "MiniMaxForCausalLM cannot be captured"),
    ],
)
def test_refused(name: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        capture(tiny_model(ENTRIES[name]))


def test_the_compile_backend_does_not_carry_states_along() -> None:
    with pytest.raises(UnsupportedModelError, match="whose states the backend 'xkv' does not carry along"):
        xkv_fx.Cache(hybrid_models.model("lfm2_moe"), Budgets((8,)))

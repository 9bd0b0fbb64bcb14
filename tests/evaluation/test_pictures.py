"""What a session keeps, as numbers and as a picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ready_models import transformed
from tiny_models import random_ids

from xkv_fx import Budgets
from xkv_fx.errors import XkvError
from xkv_fx.evaluation.pictures import draw_capacities, draw_heads, draw_kept, kept_share


def test_shares_count_the_heads_that_keep_a_token() -> None:
    llm = transformed(Budgets((6, 40)))
    session = llm.new_session()
    llm(random_ids(1, 30), past_key_values=session, logits_to_keep=1)
    shares = kept_share(session)
    assert shares.shape == (2, 30)
    assert shares.sum(1).tolist() == pytest.approx([6, 30]), "each head of a layer keeps as many tokens as it has slots"
    held = session.kept_positions(0)[0].tolist()
    assert shares[0].tolist() == pytest.approx([sum(token in head for head in held) / len(held) for token in range(30)])


def test_a_picture_is_written(tmp_path: Path) -> None:
    llm = transformed(Budgets((6, 40)))
    session = llm.new_session()
    with pytest.raises(XkvError, match="seen no tokens"):
        draw_kept(session, tmp_path / "kept.png")
    llm(random_ids(1, 30), past_key_values=session, logits_to_keep=1)
    draw_kept(session, tmp_path / "kept.png")
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")
    assert torch.equal(session.tokens_seen, torch.tensor([30]))


def test_plans_by_head_are_drawn(tmp_path: Path) -> None:
    by_head = Budgets(((6, 40), 12, (1, 2)))
    draw_heads(by_head, tmp_path / "heads.png")
    draw_capacities({"by head": by_head, "by layer": Budgets((6, 12, 2))}, tmp_path / "capacities.png")
    for name in ("heads", "capacities"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")

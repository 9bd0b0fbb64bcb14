"""The attention "xkv" where a model is neither captured nor compiled: exact without a cache, refused with one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import gemma3, gpt_oss, llama, random_ids
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import xkv_fx
from xkv_fx import Budgets
from xkv_fx.errors import BackendError, SessionError, UnsupportedModelError, XkvError
from xkv_fx.runtime import tracing_marks  # noqa: F401  (registers the ops)

LENGTH = 20


def ours(model: PreTrainedModel) -> PreTrainedModel:
    model.set_attn_implementation("xkv")
    return model


def logits(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    found: Tensor = model(ids, use_cache=False, **options).logits
    return found


@pytest.mark.parametrize("build", [llama, gemma3, gpt_oss])
def test_without_padding(build: Callable[..., PreTrainedModel]) -> None:
    ids = random_ids(2, LENGTH)
    torch.testing.assert_close(logits(ours(build()), ids), logits(build(), ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_with_padding(side: str) -> None:
    """The logits of tokens that are no padding are those of the plain model, with sliding windows too."""
    ids, mask = random_ids(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1, slice(0, 9) if side == "left" else slice(11, None)] = 0
    options = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    got, expected = (logits(model, ids, **options) for model in (ours(gemma3()), gemma3()))
    torch.testing.assert_close(got[mask != 0], expected[mask != 0], atol=1e-4, rtol=0)


def test_generate_without_a_cache() -> None:
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "use_cache": False}
    ids = random_ids(1, LENGTH)
    assert torch.equal(ours(llama()).generate(ids, **options), llama().generate(ids, **options))


def positions(*rows: list[int]) -> dict[str, Tensor]:
    return {"position_ids": torch.tensor(rows)}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attention_mask": torch.ones(1, 1, LENGTH, LENGTH)}, UnsupportedModelError, "mask of its own"),
        (positions([*range(12), *range(8)]), UnsupportedModelError, "packed into one row"),
        (positions([*range(5, LENGTH + 5)]), SessionError, "no cache.*recompile_limit"),
    ],
)
def test_what_would_be_wrong_is_refused(options: dict[str, Any], error: type[XkvError], message: str) -> None:
    with pytest.raises(error, match=message):
        logits(ours(llama(1)), random_ids(1, LENGTH), **options)


def test_caches_are_refused() -> None:
    model, budgets = ours(llama(1)), Budgets((6,))
    with pytest.raises(SessionError, match="a cache that is not ours"):
        model.generate(random_ids(1, LENGTH), max_new_tokens=3, past_key_values=DynamicCache())
    with pytest.raises(SessionError, match="works in a compiled model only"):
        model.generate(random_ids(1, LENGTH), max_new_tokens=3, past_key_values=xkv_fx.Cache(model, budgets))


def test_marks_do_not_run() -> None:
    states = torch.zeros(1, 1, 2, 4)
    for mark, argument in (("keys_of_session", states), ("keys_with_padding", states), ("refused", 0)):
        with pytest.raises(BackendError, match="backend='xkv'"):
            getattr(torch.ops.xkv, mark)(states, argument)

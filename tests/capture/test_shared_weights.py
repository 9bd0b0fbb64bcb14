"""Weights are shared with the user's model: what changes them after `transform` is refused, and nothing else is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from plain_models import decoder, example, sdpa
from tiny_models import llama, random_ids
from torch import nn

import xkv_fx
from xkv_fx import Budgets, ModelMismatchError

FULL = Budgets.full(2, 64)
IDS = random_ids(1, 12)


def adapted() -> Any:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    return peft.get_peft_model(copy.deepcopy(llama(2)), config).eval()


def plain() -> Any:
    return copy.deepcopy(llama(2))


def step_of_training(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()


def zero_a_row(model: Any) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = 0


def load_others(model: Any) -> None:
    model.load_state_dict({name: weight + 1 for name, weight in model.state_dict().items()})


def with_nan(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight[-1] = float("nan")


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (adapted, lambda model: model.merge_and_unload()),
        (adapted, lambda model: model.merge_adapter()),
        (adapted, step_of_training),
        (plain, step_of_training),
        (plain, zero_a_row),
        (plain, load_others),
        (plain, lambda model: model.half()),
    ],
)
def test_a_model_that_was_changed_is_refused(make: Callable[[], Any], change: Callable[[Any], Any]) -> None:
    model = make()
    llm = xkv_fx.transform(model, FULL, backend="eager")
    session = llm(IDS, past_key_values=llm.new_session()).past_key_values
    change(model)
    with pytest.raises(ModelMismatchError, match=r"were (changed in place|moved or cast).*transform it again"):
        llm.generate(IDS, max_new_tokens=2)
    with pytest.raises(ModelMismatchError):
        llm(IDS, past_key_values=session)
    with pytest.raises(ModelMismatchError):
        llm.with_budgets(Budgets((8, 8)))(IDS)


def there_and_back(model: nn.Module) -> None:
    model.double().float()


def gradients(model: nn.Module) -> None:
    model.requires_grad_(False).requires_grad_(True)
    model.zero_grad()


@pytest.mark.parametrize(
    "harmless",
    [
        there_and_back,
        gradients,
        lambda model: model.train(),
        lambda model: model.to("cpu", torch.float32),
        lambda model: model(IDS, labels=IDS).loss.backward(),
        lambda model: model.generate(IDS, max_new_tokens=3),
        copy.deepcopy,
        lambda model: xkv_fx.transform(model, FULL, backend="eager", check=False),
    ],
)
def test_what_leaves_the_weights_as_they_are_is_not_refused(harmless: Callable[[Any], Any]) -> None:
    model = plain()
    with_nan(model)
    llm = xkv_fx.transform(model, FULL, backend="eager", check=False)
    before = llm(IDS).logits
    harmless(model)
    torch.testing.assert_close(llm(IDS).logits, before, equal_nan=True)


def test_inference_tensors_are_taken() -> None:
    with torch.inference_mode():
        model = plain()
        llm = xkv_fx.transform(model, FULL, backend="eager")
        assert llm.generate(IDS, max_new_tokens=2).shape == (1, 14)


def test_plain_modules_are_watched_too() -> None:
    model = decoder(sdpa)
    inputs = example()
    llm = xkv_fx.transform(model, FULL, backend="eager", example_inputs=inputs)
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    with pytest.raises(ModelMismatchError, match="Decoder"):
        llm(inputs[0])

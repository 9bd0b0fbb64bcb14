"""Models in other dtypes, quantized by torchao, or with adapters of peft: the same transform, the same tokens."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from exhaustive import exhaustive
from tiny_models import llama, random_ids
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import xkv_fx
from xkv_fx import Budgets, UnsupportedModelError
from xkv_fx.evaluation.coverage import adapters

PROMPT, NEW = 40, 20
each_backend = pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=exhaustive)])


def source() -> nn.Module:
    return copy.deepcopy(llama(2, head_dim=16))


def int8() -> nn.Module:
    model = source()
    quantize_(model, Int8WeightOnlyConfig())
    return model


def with_adapter(**options: Any) -> Any:
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **options
    )
    torch.manual_seed(0)
    return peft.get_peft_model(source(), config).eval()


def logits_and_tokens(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    output = model.generate(
        input_ids=random_ids(1, PROMPT), max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    return torch.stack(output.logits), output.sequences


@each_backend
@pytest.mark.parametrize("make", [int8, with_adapter], ids=["int8", "lora"])
def test_full_budgets_are_exact(make: Any, backend: str) -> None:
    model = make()
    llm = xkv_fx.transform(model, Budgets.full(2, PROMPT + NEW), backend=backend)
    (logits, tokens), (expected_logits, expected) = logits_and_tokens(llm), logits_and_tokens(model)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        (torch.bfloat16, "eager"),
        (torch.bfloat16, "inductor"),
        (torch.float16, "eager"),
        pytest.param(torch.float16, "inductor", marks=exhaustive),
    ],
    ids=str,
)
def test_half_precision_is_as_near_to_float32_as_the_model_itself(dtype: torch.dtype, backend: str) -> None:
    """Judged by the logits of forced tokens: rounding may turn a close call between two greedy ones."""
    model: Any = source().to(dtype)
    llm = xkv_fx.transform(model, Budgets.full(2, PROMPT + NEW), backend=backend)
    ids = random_ids(1, PROMPT + NEW)
    session = llm.new_session()
    got = [session.feed(ids[:, :PROMPT], None, None, all_logits=False)]
    got += [session.step(ids[:, at : at + 1], None) for at in range(PROMPT, PROMPT + NEW)]
    with torch.no_grad():
        own = model(ids).logits[:, PROMPT - 1 :].float()
        exact = copy.deepcopy(model).float()(ids).logits[:, PROMPT - 1 :]
    assert session.session.state["k_0"].dtype == dtype
    assert (torch.cat(got, 1).float() - exact).abs().mean() < 1.5 * (own - exact).abs().mean()


def test_an_adapter_that_is_switched_off_stays_off() -> None:
    model = with_adapter()
    with model.disable_adapter():
        llm = xkv_fx.transform(model, Budgets.full(2, PROMPT + NEW), backend="eager")
        assert torch.equal(logits_and_tokens(llm)[1], logits_and_tokens(model)[1])


def test_plans_are_those_of_the_model_without_its_adapter() -> None:
    plain, adapted = source(), with_adapter()
    prompts = [random_ids(1, 30)]
    assert xkv_fx.profile(adapted, prompts).model == xkv_fx.profile(plain, prompts).model


def test_adapters_that_add_tokens_are_refused() -> None:
    model = peft.get_peft_model(source(), peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedModelError, match=r"'default'.*adds tokens of its own"):
        xkv_fx.transform(model, Budgets.full(2, 60), backend="eager")


EVERY_DAY = ("LORA", "LORA, activated", "PREFIX_TUNING", "XLORA")


@pytest.mark.parametrize(
    "name", [name if name in EVERY_DAY else pytest.param(name, marks=exhaustive) for name in adapters.names()]
)
def test_every_adapter_is_right_or_refused(name: str) -> None:
    verdict = adapters.judge(name)
    assert verdict.outcome in ("right", "refused", "not built"), verdict
    if name in EVERY_DAY:
        assert verdict.outcome == ("right" if name == "LORA" else "refused"), verdict


@pytest.mark.parametrize("training", [False, True])
def test_what_a_peft_model_does_around_its_layers_is_seen(training: bool) -> None:
    model = with_adapter().train(training)
    model.register_forward_hook(lambda module, inputs, output: setattr(output, "logits", output.logits * 2))
    with pytest.raises(UnsupportedModelError, match=r"PeftModelForCausalLM around LlamaForCausalLM.*acts outside"):
        xkv_fx.transform(model, Budgets.full(2, 60), backend="eager")
    assert model.training == training

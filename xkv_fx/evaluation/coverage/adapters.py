"""Which adapters of peft are taken: every type that the installed peft registers, on a tiny model.

    python -m xkv_fx.evaluation.coverage.adapters

An adapter is right when the transformed model generates the very tokens that peft's own model does, which are not those
of the model without it; it is refused when `transform` says why. Anything else is failed, or not built.
"""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import peft
import torch
import transformers
import typer
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn

import xkv_fx
from xkv_fx.errors import UnsupportedModelError
from xkv_fx.evaluation.coverage.classify import TOLERANCE, greedy, one_line, random_prompt
from xkv_fx.evaluation.coverage.tiny import tiny_llama

PROMPT, STEPS = 24, 12
_CELL = 240
Outcome = Literal["right", "refused", "failed", "not built"]

# What a type needs besides, or instead of, the modules that it adapts and a rank.
_MODULES: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "r": 4}
_VIRTUAL: dict[str, Any] = {"num_virtual_tokens": 4}
_OPTIONS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("CARTRIDGE", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"), _VIRTUAL),
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "C3A": {"block_size": 16},
    "CPT": {"cpt_token_ids": [3, 4], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1]},
    "FOURIERFT": {"n_frequency": 100},
    "LORA, activated": {"alora_invocation_tokens": [5, 6]},
    "LORA, DoRA": {"use_dora": True},
    "MULTITASK_PROMPT_TUNING": {**_VIRTUAL, "num_tasks": 2},
    "OFT": {"r": 0, "oft_block_size": 16},
    "ROAD": {"group_size": 8},
    "SHADOW": {"target_modules": None},
    "TRAINABLE_TOKENS": {"token_indices": list(range(3, 40)), "target_modules": ["embed_tokens"]},
    "VBLORA": {"vector_length": 16, "num_vectors": 32},
    "WAVEFT": {"n_frequency": 100},
}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one type: its name, the outcome, and why it is not right."""

    name: str
    outcome: Outcome
    reason: str = ""


def names() -> tuple[str, ...]:
    """Every type of the installed peft, and forms of LoRA that are computed otherwise."""
    known = {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    return tuple(sorted(known | {name for name in _OPTIONS if _kind(name) in known}))


def adapted_model(name: str) -> nn.Module:
    """A tiny model with an adapter of a type, one of `names`, whose weights are random."""
    model = _mixture_of_adapters() if name == "XLORA" else peft.get_peft_model(tiny_llama(), _config(name))
    torch.manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:  # those of the adapter
            nn.init.normal_(weight, std=0.3)
    return model.eval()


def judge(name: str) -> Verdict:
    """Adapt a model, transform it and compare it; no exception leaves this function."""
    try:
        model: Any = adapted_model(name)
    except Exception as error:  # of peft's code, not of ours
        return Verdict(name, "not built", one_line(error, _CELL))
    try:
        llm = xkv_fx.transform(model, xkv_fx.Budgets.full(2, PROMPT + STEPS), backend="eager")
        (tokens, logits), (expected, exact) = (greedy(each, _prompt(), STEPS) for each in (llm, model))
        plain, without = greedy(tiny_llama(), _prompt(), STEPS)
    except UnsupportedModelError as error:
        return Verdict(name, "refused", one_line(error, _CELL))
    except Exception as error:  # what we did not refuse is the finding
        return Verdict(name, "failed", f"{type(error).__name__}: {one_line(error, _CELL)}")
    if not torch.equal(tokens, expected) or not (logits - exact).abs().max() <= TOLERANCE:
        return Verdict(name, "failed", "its tokens or logits are not those of peft's own generation")
    if torch.equal(tokens, plain) and (logits - without).abs().max() <= 10 * TOLERANCE:
        return Verdict(name, "failed", "its logits are those of the model without it, so that nothing was seen")
    return Verdict(name, "right")


def table(verdicts: Iterable[Verdict]) -> str:
    """One Markdown row a type."""
    rows = (f"| {verdict.name} | {verdict.outcome} | {verdict.reason.replace('|', '/')} |" for verdict in verdicts)
    return "\n".join(("| Adapter | Outcome | Why |", "| --- | --- | --- |", *rows))


def _kind(name: str) -> str:
    return name.partition(",")[0]


def _config(name: str) -> peft.PeftConfig:
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(_kind(name))]
    known = {field.name for field in dataclasses.fields(kind)}
    options = _OPTIONS.get(name, {})
    inside = {} if {"num_virtual_tokens", "adapter_len"} & known else _MODULES
    chosen = {key: value for key, value in {**inside, **options}.items() if key in known}
    return kind(task_type="CAUSAL_LM", **chosen)


def _mixture_of_adapters() -> nn.Module:
    """X-LoRA reads the adapters that it mixes from files."""
    with tempfile.TemporaryDirectory() as folder:
        adapters = {}
        for number in range(2):
            adapters[str(number)] = str(Path(folder) / str(number))
            adapted_model("LORA").save_pretrained(adapters[str(number)])  # type: ignore[operator]
        model = tiny_llama()
        model.config.use_cache = False  # as it demands
        sizes: dict[str, Any] = {"hidden_size": 32, "adapters": adapters}
        mixed: nn.Module = peft.get_peft_model(model, peft.XLoraConfig(task_type="CAUSAL_LM", **sizes))
    return mixed


def _prompt() -> Tensor:
    """Random tokens, int64 `[1, PROMPT]`, and those among them that an adapter may wait for."""
    prompt = random_prompt(PROMPT)
    prompt[0, 5:7] = torch.tensor(_OPTIONS["LORA, activated"]["alora_invocation_tokens"])
    return prompt


def main(chosen: Annotated[list[str] | None, typer.Argument(help="Types; all of them by default.")] = None) -> None:
    """Print the table, for docs/models.md."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    verdicts = [judge(name) for name in chosen or names()]
    print(table(verdicts))
    if any(verdict.outcome == "failed" for verdict in verdicts):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

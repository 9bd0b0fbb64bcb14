"""Judging one causal language model: transformed, is it exactly what transformers itself computes?

A model is exact when transformers' own cached greedy generation and the transformed model's agree: 32 tokens behind a
prompt of 40, at full budgets, logits within 1e-3 in float32; and when at half budgets the bytes allocated are those of
the plan and 64 tokens come without NaN. It is refused when `transform` says why it does not take it, or when there is
no reference: this version of transformers cannot build the class, or its own generation is broken. Anything else is
failed.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import xkv_fx
from xkv_fx.errors import UnsupportedModelError
from xkv_fx.evaluation.coverage.tiny import VOCABULARY, Registered, tiny_model
from xkv_fx.hf.capture import layers_of_model

PROMPT, STEPS, LONG = 40, 32, 64
TOLERANCE = 1e-3
Outcome = Literal["exact", "refused", "failed"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one class.

    Attributes:
        name: of the class, and of its model type where several share it.
        outcome: see the module.
        reason: why it is not exact; for an exact one the largest difference of logits.
        seconds: what it took.
    """

    name: str
    outcome: Outcome
    reason: str
    seconds: float = 0.0


def classify(entry: Registered) -> Verdict:
    """Build one class tiny, transform it and compare it; no exception leaves this function."""
    start = time.perf_counter()
    outcome, reason = _judge(entry)
    return Verdict(entry.name, outcome, reason, time.perf_counter() - start)


def _judge(entry: Registered) -> tuple[Outcome, str]:
    try:
        model = tiny_model(entry)
    except Exception as error:  # of code that is not ours
        return "refused", f"no reference: transformers cannot build it here: {one_line(error)}"
    prompt = random_prompt()
    try:
        expected = greedy(model, prompt, STEPS)
    except Exception as error:  # of code that is not ours
        expected, broken = None, one_line(error)
    try:
        if expected is None:
            xkv_fx.transform(model, xkv_fx.Budgets.full(len(layers_of_model(model)), PROMPT + STEPS), backend="eager")
            return "refused", f"no reference: transformers' own cached generation fails: {broken}"
        outcome, reason = compare(model, prompt, expected)
        if outcome == "failed" and (off := _reference_error(model, prompt, expected)) > TOLERANCE:
            return "refused", (
                f"no reference: the logits of transformers' own cached generation are {off:.2g} away from those of its "
                "forward without a cache"
            )
    except UnsupportedModelError as error:
        return "refused", one_line(error)
    except Exception as error:  # what we did not refuse is the finding
        return "failed", f"{type(error).__name__}: {one_line(error)}"
    return outcome, reason


def _reference_error(model: PreTrainedModel, prompt: Tensor, expected: tuple[Tensor, Tensor]) -> float:
    """How far transformers' cached logits are from those of its own forward on the same tokens without a cache."""
    tokens, logits = expected
    with torch.no_grad():
        whole = model(torch.cat((prompt, tokens[None]), 1), use_cache=False).logits[0, prompt.shape[1] - 1 : -1]
    return float((whole - logits).abs().max())


def compare(model: PreTrainedModel, prompt: Tensor, expected: tuple[Tensor, Tensor]) -> tuple[Outcome, str]:
    """Transform a model at full and at half budgets and judge it.

    Args:
        prompt: int64 `[1, S]`.
        expected: the tokens and logits of the model's own greedy generation.

    Raises:
        UnsupportedModelError: the model is refused.
    """
    specs = layers_of_model(model)
    layers = len(specs)
    tokens = prompt.shape[1] + expected[0].shape[0]
    llm = xkv_fx.transform(model, xkv_fx.Budgets.full(layers, tokens), backend="eager")
    got, logits = greedy(llm, prompt, expected[0].shape[0])
    error = float((logits - expected[1]).abs().max())
    if not torch.equal(got, expected[0]) or not error <= TOLERANCE:
        first = int((got != expected[0]).long().argmax()) if not torch.equal(got, expected[0]) else -1
        error = float((logits - expected[1])[: first + 1].abs().max()) if first >= 0 else error
        return "failed", f"not exact: logits differ by {error:.2g}, tokens from step {first}"

    half = xkv_fx.Budgets.uniform(layers, tokens // 2)
    tight = llm.with_budgets(half)
    session = tight.new_session()
    output = tight.generate(
        prompt, max_new_tokens=LONG, do_sample=False, past_key_values=session,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    planned = half.kv_bytes(specs)
    if not session.kv_bytes == tight.kv_bytes == planned:
        return "failed", f"half budgets: {session.kv_bytes} bytes allocated, {planned} planned"
    if output.sequences.shape[1] != prompt.shape[1] + LONG or not torch.cat(output.logits).isfinite().all():
        return "failed", f"half budgets: {LONG} tokens were to be generated without NaN"
    return "exact", f"logits within {error:.0e}" if error else "logits equal"


def random_prompt(length: int = PROMPT, seed: int = 0) -> Tensor:
    """int64 `[1, length]`, none of them padding, start or end."""
    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def greedy(model: Any, prompt: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """`steps` new tokens `[steps]` and their logits `[steps, vocabulary]`, by `generate` with a cache."""
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=steps, min_new_tokens=steps, do_sample=False,
        num_beams=1, use_cache=True, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return output.sequences[0, prompt.shape[1] :], torch.cat(output.logits)


def work(entry: Registered, sender: Connection) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    sender.send(classify(entry))


def one_line(error: Exception, most: int = 400) -> str:
    """An error's message for a cell of a table, of at most so many characters."""
    return " ".join(str(error).split())[:most]

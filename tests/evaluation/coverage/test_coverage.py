"""The sweep over all registered classes: a fixed sample of it, and what it makes of classes that go wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ready_models
import torch
import typer
from exhaustive import exhaustive
from failing_work import crash, stall
from old_versions import OLD_TRANSFORMERS
from tiny_models import FAMILIES
from typer.testing import CliRunner

from xkv_fx.errors import UnsupportedModelError
from xkv_fx.evaluation.coverage import __main__ as coverage
from xkv_fx.evaluation.coverage import classify as judging
from xkv_fx.evaluation.coverage.classify import Verdict, classify, compare, greedy, random_prompt
from xkv_fx.evaluation.coverage.tiny import registered, tiny_config, tiny_model

ENTRIES = {entry.model_type: entry for entry in registered()}
# With the families of test_families, which are looked at more closely there, a sample of 25.
SAMPLE = (
    "bart",  # positions counted from the length
    "bert",  # causal when it is a decoder
    "bloom",  # attention written out, ALiBi
    "cohere2",
    "deepseek_v3",  # MLA, mixture of experts
    "diffllama",  # two attentions a layer
    "falcon",
    "gemma3n_text",  # layers that take the keys and values of others
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",  # local attention written out
    "gpt_neox",
    "gptj",
    "llama4_text",  # attention in chunks
    "mixtral",
    "mpt",
    "opt",
    "phi",  # partial rotary embedding
)
REFUSED = {
    "mamba": "there is nothing to budget",
    "minimax": "uses cache of its own",
    "deepseek_v4": "picks the keys of each query by what the tokens are",
    "xlm": "mixes values that depend on the tokens",
    "doge": "adds a mask of its own",
    "musicgen": "transformers cannot build it here" if OLD_TRANSFORMERS else "MusicgenForCausalLM cannot be captured",
}


def test_the_sample_has_25_classes() -> None:
    assert not set(SAMPLE) & FAMILIES.keys()
    assert len(SAMPLE) + len(FAMILIES) == 25


@pytest.mark.parametrize("model_type", SAMPLE)
def test_exact(monkeypatch: pytest.MonkeyPatch, model_type: str) -> None:
    ready_models.capture_once(monkeypatch)  # counting the layers of some means to capture them
    verdict = classify(ENTRIES[model_type])
    assert verdict.outcome == "exact", verdict.reason


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_with_a_reason(model_type: str) -> None:
    verdict = classify(ENTRIES[model_type])
    assert verdict.outcome == "refused"
    assert REFUSED[model_type] in verdict.reason


def test_every_registered_class_is_an_entry_with_a_name_of_its_own() -> None:
    names = [entry.name for entry in registered()]
    assert len(set(names)) == len(names) >= (178 if OLD_TRANSFORMERS else 189)
    assert ("LlamaForCausalLM" if OLD_TRANSFORMERS else "LlamaForCausalLM (llama)") in names
    assert "BloomForCausalLM" in names


def test_a_tiny_configuration_has_a_layer_of_each_kind() -> None:
    assert set(tiny_config("gemma3_text").layer_types) == {"sliding_attention", "full_attention"}
    assert tiny_config("llama").num_hidden_layers == 2
    assert tiny_config("gemma3").text_config.hidden_size == 32


def test_other_logits_than_transformers_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """`compare` must see a difference in one logit, and one token."""
    ready_models.capture_once(monkeypatch)
    model, prompt = tiny_model(ENTRIES["llama"]), random_prompt()
    tokens, logits = greedy(model, prompt, 6)
    assert compare(model, prompt, (tokens, logits))[0] == "exact"
    changed = logits.clone()
    changed[5, 3] += 0.01
    outcome, reason = compare(model, prompt, (tokens, changed))
    assert outcome == "failed"
    assert "not exact" in reason
    other = tokens.clone()
    other[2] += 1
    assert compare(model, prompt, (other, logits))[0] == "failed"


@pytest.mark.parametrize(
    ("broken", "outcome", "reason"),
    [
        ("tiny_model", "refused", "no reference: transformers cannot build it here: it broke"),
        ("greedy", "refused", "no reference: transformers' own cached generation fails: it broke"),
        ("compare", "failed", "RuntimeError: it broke"),
    ],
)
def test_whatever_breaks_is_said(monkeypatch: pytest.MonkeyPatch, broken: str, outcome: str, reason: str) -> None:
    def fails(*args: Any) -> Any:
        raise RuntimeError("it broke")

    monkeypatch.setattr(judging, broken, fails)
    verdict = classify(ENTRIES["llama"])
    assert (verdict.outcome, verdict.reason) == (outcome, reason)


def test_a_refusal_in_the_comparison_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: Any) -> Any:
        raise UnsupportedModelError("not\n  this one")

    monkeypatch.setattr(judging, "compare", refuses)
    verdict = classify(ENTRIES["llama"])
    assert (verdict.outcome, verdict.reason) == ("refused", "not this one")


def test_a_reference_that_disagrees_with_itself_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    real = greedy

    def off(model: Any, prompt: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, logits = real(model, prompt, steps)
        return tokens, logits if type(model).__name__ == "BudgetedLM" else logits + 0.5

    monkeypatch.setattr(judging, "greedy", off)
    verdict = classify(ENTRIES["llama"])
    assert verdict.outcome == "refused"
    assert "are 0.5 away from those of its forward without a cache" in verdict.reason


@pytest.mark.parametrize(
    ("work", "reason"),
    [(stall, "not done after 1 s"), pytest.param(crash, "ended with code 3", marks=exhaustive)],  # imports everything
)
def test_no_class_can_stall_or_crash_the_sweep(monkeypatch: pytest.MonkeyPatch, work: Any, reason: str) -> None:
    monkeypatch.setattr(coverage, "work", work)
    monkeypatch.setattr(coverage, "PRELOADED", ())
    (verdict,) = coverage.sweep([ENTRIES["llama"]], time_limit=1.0 if work is stall else 60.0)
    assert verdict.outcome == "failed"
    assert reason in verdict.reason


def test_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    verdicts = [Verdict("A", "exact", "logits equal"), Verdict("B", "refused", "a | b"), Verdict("C", "failed", "c")]
    monkeypatch.setattr(coverage, "sweep", lambda entries, *rest: verdicts[: len(entries)])
    app = typer.Typer()
    app.command()(coverage.main)
    path = tmp_path / "docs" / "coverage.md"
    result = CliRunner().invoke(app, ["llama", "gpt2", "--output", str(path)])
    assert result.exit_code == 0, result.output
    assert "1 exact, 1 refused, 0 failed of 2" in result.output
    text = path.read_text()
    assert "| A | exact | logits equal |\n| B | refused | a / b |" in text
    assert "**1 exact, 1 refused, 0 failed of 2**" in text
    assert CliRunner().invoke(app, ["llama", "gpt2", "opt"]).exit_code == 1
    assert CliRunner().invoke(app, ["no-such-class"]).exit_code == 2

"""Tiny models, captured and transformed ones, made once and shared by many tests; nobody may change them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from latent_models import deepseek
from tiny_models import FAMILIES
from transformers import PreTrainedModel

from xkv_fx import Budgets, Policy
from xkv_fx.budgets import Capacity
from xkv_fx.capture.captured import CapturedModel
from xkv_fx.formats import PlannedFormats
from xkv_fx.hf.capture import capture
from xkv_fx.hf.generation import BudgetedLM
from xkv_fx.lowering.program import CompiledProgram, Graphs, compile_program
from xkv_fx.mean_keys import MeanKeys
from xkv_fx.runtime.scorers import scorer_of
from xkv_fx.runtime.state import CachePlan

FULL = 72
"""Slots of each layer of the models with full budgets."""


def model(family: str = "llama", layers: int = 2) -> PreTrainedModel:
    return _model(family, layers)


@functools.cache
def _model(family: str, layers: int) -> PreTrainedModel:
    return deepseek(layers) if family == "deepseek" else FAMILIES[family](layers)


def captured(family: str = "llama", layers: int = 3, rows: int = 2) -> CapturedModel:
    return _captured(family, layers, rows)


@functools.cache
def _captured(family: str, layers: int, rows: int) -> CapturedModel:
    return capture(model(family, layers), rows=rows, check=False)


def remember_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the public calls capture the shared model of two layers only once; other models as ever."""

    def once(source: Any, rows: int = 1, check: bool = True, decode: bool = True) -> CapturedModel:
        return captured("llama", 2, rows) if source is model() else capture(source, rows, check, decode)

    monkeypatch.setattr("xkv_fx.hf.capture.capture", once)


def capture_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all public calls capture a model whole, checked and only once, until the patch is undone."""
    whole = functools.cache(lambda model, rows: capture(model, rows))
    monkeypatch.setattr("xkv_fx.hf.capture.capture", lambda model, rows=1, **_: whole(model, rows))


def remember_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `transform` and `with_budgets` lower a captured model under one plan only once; sessions are ever new."""
    for place in ("program", "budgeted"):
        monkeypatch.setattr(f"xkv_fx.lowering.{place}.compile_program", _program)


@functools.cache
def _program(
    source: CapturedModel, budgets: Budgets, backend: str, max_new_tokens: int = 0, over_limit: bool = False
) -> CompiledProgram:
    return compile_program(source, budgets, backend, max_new_tokens, over_limit)


def transformed(budgets: Budgets, rows: int = 1, family: str = "llama", max_new_tokens: int = 0) -> BudgetedLM:
    """A model of two layers, as `xkv_fx.transform` makes it with the backend "eager", but captured only once."""
    return _transformed(budgets, rows, family, max_new_tokens)


def transform_again(budgets: Budgets, rows: int = 1, family: str = "llama", max_new_tokens: int = 0) -> BudgetedLM:
    """As `transformed`, but with graphs of its own that nobody has used."""
    source = captured(family, 2, rows)
    plan = cache_plan(source, budgets.capacities, budgets.policy, max_new_tokens, budgets.formats, budgets.mean_keys)
    graphs = Graphs(source, plan, scorer_of(budgets.policy))
    return BudgetedLM(model(family).config, model(family).generation_config, budgets, CompiledProgram(graphs, "eager"))


_transformed = functools.cache(transform_again)


def full(rows: int = 1, family: str = "llama") -> BudgetedLM:
    """A model that evicts nothing."""
    return transformed(Budgets.full(2, FULL), rows, family)


def cache_plan(
    source: CapturedModel,
    capacities: tuple[Capacity, ...],
    policy: Policy | None = None,
    max_new_tokens: int = 0,
    formats: tuple[PlannedFormats, ...] | None = None,
    mean_keys: MeanKeys | None = None,
) -> CachePlan:
    """The plan of a captured model's caches."""
    budgets = Budgets(capacities, policy or Policy(), formats=formats, mean_keys=mean_keys)
    return CachePlan.of(budgets, source.layers, source.rows, torch.float32, torch.device("cpu"), max_new_tokens)

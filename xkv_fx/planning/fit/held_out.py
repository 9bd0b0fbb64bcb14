"""KL of plans on held-out prompts; what was measured once is remembered, in a file as well where a run may go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xkv_fx.budgets import Plan
from xkv_fx.capture.captured import CapturedModel
from xkv_fx.errors import FileFormatError, PromptError
from xkv_fx.files import read_sealed_json, write_sealed_json
from xkv_fx.passes.measure.cut_at_attention import CutModel
from xkv_fx.planning.measure.calibrate import check_prompt, cut_checked
from xkv_fx.planning.measure.continuation import layer_plans, run_full
from xkv_fx.planning.measure.weights import digest_of_weights
from xkv_fx.policy import Policy

FORMAT = "xkv_fx.held_out"
VERSION = 1

Row = tuple[Tensor, int]
"""Token ids, int64 `[1, S + T]`, and T: the last tokens, which are fed as decode would and measured."""


class HeldOut:
    """The held-out prompts of one fit.

    Args:
        captured: a model captured for one row.
        rows: the prompts.
        file: where to keep what was measured; nowhere when None.

    Raises:
        PromptError: a prompt that is too short for its continuation, too long, or of unknown tokens.
    """

    def __init__(self, captured: CapturedModel, rows: Sequence[Row], file: Path | None) -> None:
        self.captured = captured
        self.rows = [(check_prompt(index, ids, captured, tokens), tokens) for index, (ids, tokens) in enumerate(rows)]
        self._file = file
        self._known = {} if file is None or not file.is_file() else _read(file)
        self._cut: dict[Policy, CutModel] = {}
        self._base = f"{captured.fingerprint} {captured.dtype} {digest_of_weights(captured)}"

    def kl(
        self, plans: Sequence[Plan], prompts: int | None = None, more: Callable[[int], bool] | None = None
    ) -> NDArray[np.float64]:
        """KL(full || plan), nats, the mean over each continuation: float64 `[plans, prompts]`.

        Args:
            plans: of any policies.
            prompts: only so many of the first prompts; all when None.
            more: asked before each prompt but the first, with the number that is done, whether to go on.
        """
        columns: list[list[float]] = []
        for index in range(len(self.rows) if prompts is None else min(prompts, len(self.rows))):
            if index and more is not None and not more(index):
                break
            columns.append(self._of_prompt(index, plans))
        return np.array(columns).T

    def _of_prompt(self, index: int, plans: Sequence[Plan]) -> list[float]:
        keys = [self._key(index, plan) for plan in plans]
        missing: dict[Policy, dict[str, Plan]] = {}
        for key, plan in zip(keys, plans, strict=True):
            if key not in self._known:
                missing.setdefault(plan.policy, {})[key] = plan
        for policy, of_policy in missing.items():
            self._measure(index, policy, of_policy)
        if missing and self._file is not None:
            write_sealed_json(self._file, {"format": FORMAT, "version": VERSION, "kl": self._known})
        return [self._known[key] for key in keys]

    def _measure(self, index: int, policy: Policy, plans: Mapping[str, Plan]) -> None:
        ids, tokens = self.rows[index]
        scorer = self.captured.scorer_of(policy)
        if policy not in self._cut:
            self._cut[policy] = cut_checked(self.captured, scorer, ids, tokens)
        full = run_full(self._cut[policy], scorer, ids, tokens)
        kl = full.divergence([layer_plans(plan, self.captured.layers, tokens) for plan in plans.values()]).mean(1)
        if not bool(torch.isfinite(kl).all()):
            raise PromptError(f"the model's output on prompt {index} is not finite; does its dtype overflow?")
        self._known.update(zip(plans, kl.tolist(), strict=True))

    def _key(self, index: int, plan: Plan) -> str:
        ids, tokens = self.rows[index]
        decisive = {name: value for name, value in plan.to_dict().items() if name != "provenance"}
        described = [self._base, decisive, tokens]
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        digest.update(ids.cpu().numpy().astype("<i8").tobytes())
        return digest.hexdigest()


def _read(file: Path) -> dict[str, float]:
    """What was measured so far; nothing where the file is damaged, so that it is measured again."""
    try:
        known: dict[str, float] = read_sealed_json(file, FORMAT, VERSION)["kl"]
    except (FileFormatError, KeyError):
        return {}
    return known

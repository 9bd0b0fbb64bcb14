"""The public calls. Each is a few lines on top of the subpackages that do the work."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from xkv_fx.budgets import Plan
from xkv_fx.errors import BudgetError, UnsupportedModelError
from xkv_fx.files import is_int
from xkv_fx.policy import Policy
from xkv_fx.public_budgets import Budgets, budgets_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

    from xkv_fx.capture.captured import CapturedModel
    from xkv_fx.engines.engine import Engine
    from xkv_fx.formats import LayerFormats
    from xkv_fx.hf.generation import BudgetedLM
    from xkv_fx.layers import HasItemSize
    from xkv_fx.lowering.plain import BudgetedModule
    from xkv_fx.planning.data.calibration_data import Calibration
    from xkv_fx.planning.data.profile_data import Profile
    from xkv_fx.planning.fit.data import Fit
    from xkv_fx.planning.measure.verify import Verification
    from xkv_fx.planning.solve.allocators import Allocator

__all__ = ["calibrate", "export", "fit", "fit_quality", "load", "profile", "solve", "transform", "verify"]


def profile(
    model: Any,
    prompts: Sequence[str | Tensor | Sequence[int]],
    sampling: float | str = 1.0,
    policy: Policy | None = None,
    tokenizer: Any = None,
    progress: Callable[[int, int], None] | None = None,
    statistics: Sequence[str] = (),
    group: ProcessGroup | None = None,
    by: str = "layer",
) -> Profile:
    """Measure how much attention mass each layer keeps at every capacity (XKV, arXiv 2412.05896).

    Only what the scores need is run: no decoding, no output projection, nothing after the last layer's scores.

    Args:
        model: a transformers causal language model; it is not changed.
        prompts: strings, or token ids of shape `[S]` or `[1, S]`, like those the plan will serve.
        sampling: the first share of the prompts to measure, 0.1 or `"10%"`; the paper samples 0.1 or 0.2.
        policy: the policy that the plan will be served with; the paper's scorer with a ring by default.
        tokenizer: needed for strings.
        progress: called as `progress(done, total)` after each prompt.
        statistics: what else to measure: `"preference"` for the allocator `"entropy"` (CAKE, arXiv 2503.12491),
            `"similarity"` for `"squeeze"` (SqueezeAttention, arXiv 2404.04793).
        group: processes to share the prompts with, such as `torch.distributed.group.WORLD` under `torchrun` or
            `accelerate launch`; when None, this process measures them all. Every process of the group makes the same
            call and gets the same profile, bit for bit the one that a single process with as many threads would get. An
            error in one is raised in all; `progress` is called in the first.
        by: `"head"` for a curve of each KV head: the plan then gives each its own capacity. Heads are pooled by their
            scores, as the paper pools layers. `"layer"` by default.

    Raises:
        PromptError: no prompts, an empty one, one too short to rank or too long for the model's positions, or one with
            tokens that the model does not have.
        UnsupportedModelError: the model cannot be captured exactly.
        BudgetError: `sampling` out of range, an unknown statistic, a policy whose scorer is unknown or does not measure
            attention, or processes of the group that were given something else.
    """
    from xkv_fx.hf.capture import capture
    from xkv_fx.hf.prompts import tokenize
    from xkv_fx.planning.measure.profile import check_profilable, measure_profile, sample_prompts
    from xkv_fx.planning.measure.team import team_of

    policy = Policy() if policy is None else policy

    def prepare() -> tuple[tuple[Tensor, ...], CapturedModel]:
        check_profilable(policy, by)
        return sample_prompts(tokenize(prompts, tokenizer), sampling), capture(model, decode=False)

    team = team_of(group, model)
    sampled, captured = team.together(prepare)
    return measure_profile(captured, sampled, policy, progress, statistics, team, by)


def calibrate(
    model: Any,
    prompts: Sequence[str | Tensor | Sequence[int]],
    grid: Sequence[float] | None = None,
    policy: Policy | None = None,
    continuation: int = 16,
    tokenizer: Any = None,
    progress: Callable[[int, int], None] | None = None,
    resume: str | os.PathLike[str] | None = None,
    group: ProcessGroup | None = None,
    formats: Sequence[str | LayerFormats] | None = None,
    by: str = "layer",
) -> Calibration:
    """Measure how far the output strays from the full cache when one layer alone holds less, or stores fewer bits.

    Each prompt is prefilled, which attends to all of its tokens whatever the budgets are; then one layer keeps the
    survivors that the policy chooses for a capacity, all others keep everything, and the last `continuation` tokens of
    the text are fed as decode would. What is measured is the KL divergence of the next-token distributions from those
    of the full cache, the mean over the continuation. A capacity counts everything that the layer holds after the
    prompt. Under `eviction="append"` the continuation comes on top of it; under `"ring"` and `"scored"` its tokens take
    the place of others, as they will when the plan serves.

    Only the continuation is run again, from the changed layer on, all capacities of a layer in one pass.

    With `formats`, each capacity is measured in each format, and so is a full cache. What survives the prompt is
    stored in the formats, and so is every token of the continuation before it is attended to; the prompt itself is
    attended to as it is. `solve` then chooses capacity and formats of each layer together.

    Args:
        model: a transformers causal language model; it is not changed.
        prompts: strings, or token ids of shape `[S]` or `[1, S]`, like those the plan will serve; the last
            `continuation` tokens of each are its continuation.
        grid: capacities to measure, ascending, as shares of the tokens before the continuation, above 0 and below 1;
            1/64, 1/32, 1/16, 1/8, 1/4, 3/8, 1/2 and 3/4 by default; fewer for each pair of formats.
        policy: the policy that the plan will be served with; the paper's scorer with a ring by default.
        continuation: tokens fed after each prompt.
        tokenizer: needed for strings.
        progress: called as `progress(done, total)` after each prompt.
        resume: a folder for what was measured so far, one file a prompt. After an interruption the same call goes on
            from there; results from other weights, policies, grids or prompts are not reused.
        group: processes to share the prompts with; see `profile`. With `resume` each writes the files of its prompts.
        formats: what slots may store, `"model"` (the model's dtype), `"int8"`, `"int4"` and `"fp8"`: each for keys and
            values alike, and int8 keys with int4 values where both are named and no layer caches latents. Or pairs of
            such names, of keys and of values. The model's dtype alone by default.
        by: `"head"` measures each KV head alone, all other heads full, at fewer points than layers: up to four heads a
            layer take about half as much again as layers, more heads in proportion. The plan then gives each head its
            own capacity, and formats. `"layer"` by default.

    Raises:
        PromptError: no prompts, one that is too short for its continuation or too long for the model's positions, or
            one with tokens that the model does not have.
        UnsupportedModelError: the model cannot be captured exactly, or its tokens meet outside attention.
        BudgetError: a grid or continuation out of range, an unknown scorer, a policy that never evicts, formats
            that are unknown or that a layer cannot be stored in, or processes of the group that were given something
            else.
    """
    from xkv_fx.hf.capture import capture
    from xkv_fx.hf.prompts import tokenize
    from xkv_fx.planning.measure.calibrate import check_measurable, measure_calibration
    from xkv_fx.planning.measure.points import pairs_to_measure
    from xkv_fx.planning.measure.team import team_of

    policy = Policy() if policy is None else policy

    def prepare() -> tuple[tuple[Tensor, ...], CapturedModel]:
        check_measurable(policy, continuation, grid, by)
        pairs_to_measure(formats)
        return tokenize(prompts, tokenizer), capture(model, decode=False)

    team = team_of(group, model)
    rows, captured = team.together(prepare)
    return measure_calibration(captured, rows, policy, grid, continuation, progress, resume, team, formats, by=by)


def solve(
    profile: Profile | Calibration,
    *,
    fraction: float | str | None = None,
    total_tokens: int | None = None,
    retention: float | str | None = None,
    kv_bytes: int | str | None = None,
    context: int | None = None,
    allocator: str | Allocator | None = None,
    multiple: int = 16,
    floor: int = 1,
    batch_size: int = 1,
    dtype: HasItemSize | None = None,
    max_new_tokens: int = 0,
    formats: LayerFormats | None = None,
) -> Budgets:
    """Solve how many KV slots each layer gets, under exactly one constraint.

    From a calibration of several formats, each layer's capacity and the formats of its keys and values are chosen
    together, by measured KL per byte: the summed KL exceeds the least possible by less than the gain of one more step
    in one layer, the first step that no longer fits into the bytes.

    Args:
        profile: measured retention curves, or a calibration's measured divergences.
        fraction: the share to keep of the bytes that a full cache of `context` tokens takes in the model's dtype,
            sliding windows clamped; above 0 and at most 1, or a string such as `"38%"`. Without sliding windows, and
            with slots of one size, that is the share of `layers * context` tokens.
        total_tokens: the sum of the capacities, exact; not for a calibration of several formats, where tokens differ in
            size.
        retention: the least share of attention mass to keep, as a mean over layers, with the fewest tokens; for a
            profile only.
        kv_bytes: the most bytes that the K/V buffers of `batch_size` rows in `dtype` may take, room for
            `max_new_tokens` included; a whole number, or a string such as `"2GB"` or `"1.5 GiB"`. `transform` refuses
            to allocate more. Where a limit is far above what the prompts can use, and `context` is not given, a warning
            names the context that the limit would serve.
        context: tokens of prompt to plan for; the longest profiled prompt by default.
        allocator: a registered name or an `Allocator`; by default `"xkv"` for a profile, `"calibrated"` for a
            calibration. Only `"calibrated"` chooses formats.
        multiple: round capacities to multiples of this; a total stays exact. Few distinct sizes compile faster.
        floor: the fewest slots of every layer; a layer whose sliding window is smaller gets that.
        batch_size: rows after expansion, batch x beams or return sequences; counts for `kv_bytes` only, since
            capacities are per row.
        dtype: for `kv_bytes`, the dtype of whatever has no format of its own; each layer's own by default.
        max_new_tokens: for `kv_bytes`, the room for generated tokens that is set aside inside the limit, in each
            layer's own formats; give `transform` the same number, or a smaller one. Counts under `eviction="append"`
            only.
        formats: for a profile, which says nothing about them: the pair of formats of keys and of values that every
            layer is to be stored in, such as `("int8", "int4")`; the model's dtype by default. Their bytes count for
            `kv_bytes` and `fraction`.

    Returns:
        the plan; its provenance says how it was made, and which retention (of a profile) or KL (of a calibration) is
        expected of it.

    Raises:
        BudgetError: no constraint or several, one that cannot be met or is out of range, or an allocator that needs
            what was not measured.
    """
    from xkv_fx.planning.solve.plan import solve_plan
    from xkv_fx.planning.solve.unused import unused_limit

    plan = solve_plan(
        profile,
        fraction=fraction,
        total_tokens=total_tokens,
        retention=retention,
        kv_bytes=kv_bytes,
        context=context,
        allocator=allocator,
        multiple=multiple,
        floor=floor,
        batch_size=batch_size,
        dtype=dtype,
        max_new_tokens=max_new_tokens,
        formats=formats,
    )
    unused = unused_limit(plan, profile.model_layers, dtype) if context is None else None
    if unused is not None:
        warnings.warn(unused, stacklevel=2)
    return budgets_of(plan)


@overload
def verify(
    model: Any,
    budgets: Plan,
    prompts: Sequence[str | Tensor | Sequence[int]],
    continuation: int = ...,
    tokenizer: Any = ...,
    progress: Callable[[int, int], None] | None = ...,
) -> Verification: ...


@overload
def verify(
    model: Any,
    budgets: Sequence[Plan],
    prompts: Sequence[str | Tensor | Sequence[int]],
    continuation: int = ...,
    tokenizer: Any = ...,
    progress: Callable[[int, int], None] | None = ...,
) -> tuple[Verification, ...]: ...


def verify(
    model: Any,
    budgets: Plan | Sequence[Plan],
    prompts: Sequence[str | Tensor | Sequence[int]],
    continuation: int = 48,
    tokenizer: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verification | tuple[Verification, ...]:
    """Measure a plan on held-out prompts, against plans of equal bytes: a uniform one in the model's dtype, and the
    best plan that stores all layers in one format, with every token where they all fit and equal capacities otherwise.
    Bytes are counted in the dtype that the plan was solved for, if `solve` was given one, else in the model's.

    As in `calibrate`, the last `continuation` tokens of each prompt are fed as decode would, under the plan's own
    policy: on top of the capacities under `eviction="append"`, in place of other tokens under `"ring"` and `"scored"`.

    Args:
        model: a transformers causal language model; it is not changed.
        budgets: the plan; or several of one policy, which then share one prefill of each prompt.
        prompts: strings, or token ids of shape `[S]` or `[1, S]`, which the plan was not made from; 32 or more, since a
            few prompts dominate the mean.
        continuation: tokens fed after each prompt.
        tokenizer: needed for strings.
        progress: called as `progress(done, total)` after each prompt.

    Returns:
        mean, median and 95th percentile of these plans' KL to the full cache, and the ratios of the means with their
        paired 95 % bootstrap intervals over prompts; `report.better` says whether that to uniform lies below 1,
        `report.best` which of the three is better than the others, and `report.stored_in(budgets)` is the plan with the
        report in its provenance. One report a plan.

    Raises:
        BudgetError: the plan does not fit the model's layers, or never evicts.
        ModelMismatchError: the plan was made for another model.
        PromptError: no prompts, one that is too short for its continuation or too long for the model's positions, or
            one with tokens that the model does not have.
        UnsupportedModelError: the model cannot be captured exactly, or its tokens meet outside attention.
    """
    from xkv_fx.hf.capture import capture
    from xkv_fx.hf.prompts import tokenize
    from xkv_fx.planning.measure.calibrate import check_measurable
    from xkv_fx.planning.measure.verify import verify_plans

    plans = (budgets,) if isinstance(budgets, Plan) else budgets
    if not isinstance(plans, Sequence) or not plans or not all(isinstance(plan, Plan) for plan in plans):
        raise BudgetError(f"budgets must be an xkv_fx.Budgets, or several; got {type(budgets).__name__}")
    for plan in plans:
        check_measurable(plan.policy, continuation)
    rows = tokenize(prompts, tokenizer)
    reports = verify_plans(capture(model, decode=False), plans, rows, continuation, progress)
    return reports[0] if isinstance(budgets, Plan) else reports


def fit(
    model: Any,
    prompts: Sequence[str | Tensor | Sequence[int]],
    *,
    kv_bytes: int | str | None = None,
    memory: int | str | None = None,
    fraction: float | str | None = None,
    kl: float | None = None,
    batch_size: int = 1,
    context: int | None = None,
    max_new_tokens: int = 0,
    tokenizer: Any = None,
    tasks: Sequence[tuple[Any, Any]] | None = None,
    seconds: float | None = None,
    formats: Sequence[str | LayerFormats] = ("model", "int8", "int4"),
    scorers: Sequence[str] = ("snapkv", "expected_attention", "key_diff"),
    by: Sequence[str] = ("layer", "head"),
    multiple: int = 16,
    continuation: int = 48,
    resume: str | os.PathLike[str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    found: Callable[[Budgets, str], None] | None = None,
) -> Fit:
    """Find the best plan under a limit, and say what the limit costs.

    Every other prompt is held out. Plans that need no measuring come first (uniform ones in each format, and all tokens
    in fewer bits where that fits); then capacities and formats solved from the KL measured on the other prompts, served
    by each of the ways to evict and by the two scorers that did best. All are measured on the held-out prompts, as
    `verify` does, and the one of the least mean KL is taken; under `kl`, the one of the fewest bytes.

    Args:
        model: a transformers causal language model; it is not changed.
        prompts: strings, or token ids of shape `[S]` or `[1, S]`, like those the plan will serve; at least 2, and 24 or
            more for a plan to rely on. The last `continuation` tokens of each held-out one are what is measured.
        kv_bytes, memory: two names of one limit: the most bytes that the K/V buffers of `batch_size` rows may take,
            room for generated tokens included; a number, or a string such as `"2GB"`, `"1.5 GiB"`.
        fraction: the limit as a share of the bytes that a full cache of `context` tokens takes in the model's dtype;
            `0.25` or `"25%"`.
        kl: instead of a limit in bytes, a bound on the mean KL on held-out prompts, nats; the fewest bytes are found.
        batch_size: rows after expansion, batch x beams or return sequences.
        context: tokens of prompt to plan for; by default the longest prompt, its continuation not counted.
        max_new_tokens: generated tokens for which a plan may set room aside inside the limit (`eviction="append"`);
            with 0, plans overwrite tokens (`"ring"`) and serve any number.
        tokenizer: needed for strings.
        tasks: pairs of a text and what comes behind it in a second turn, such as a question with its answer. The KL on
            the latter, with the text already cut down to its budget, counts beside that of the held-out prompts.
        seconds: that it may take, about. Then fewer prompts are measured, and what takes too long is left out, which
            the report says. By default it takes what it needs.
        formats: what slots may store; see `calibrate`. Those that a layer cannot be stored in are left out.
        scorers: that may rank tokens; see `Policy`.
        by: what gets a capacity of its own: `"layer"`, `"head"`, or both, of which the better one is taken.
        multiple: capacities are rounded to multiples of this.
        continuation: tokens of each held-out prompt that are fed as decode would.
        resume: a folder for what was measured. After an interruption the same call goes on from there, and ends with
            the same plan.
        progress: called as `progress(what, done, total)`.
        found: called with each plan that is better than those before, and with how it was made; the first comes soon.

    Returns:
        `budgets`, `report` and `candidates`. The held-out prompts chose among the candidates, so that the KL of the
        chosen one is a little better there than it will be on others.

    Raises:
        BudgetError: no limit or several, one below one slot a layer, a bound that no plan keeps, or arguments out of
            range.
        PromptError: fewer than 2 prompts, one that is too short for its continuation or too long for the model's
            positions, or one with tokens that the model does not have.
        UnsupportedModelError: the model cannot be captured exactly, or its tokens meet outside attention.
    """
    from xkv_fx.hf.capture import capture
    from xkv_fx.hf.prompts import second_turns, tokenize
    from xkv_fx.planning.fit.limits import in_bytes, only_limit
    from xkv_fx.planning.fit.search import fit_plan, planned_context
    from xkv_fx.planning.fit.settings import FitSettings

    name, value = only_limit(kv_bytes=kv_bytes, memory=memory, fraction=fraction, kl=kl)
    asked: dict[str, Any] = {
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "formats": tuple(formats),
        "scorers": tuple(scorers),
        "by": tuple(by),
        "multiple": multiple,
        "continuation": continuation,
        "seconds": seconds,
        "context": context,
    }
    FitSettings(kv_bytes=1, **asked)  # before capture, which takes seconds
    rows = tokenize(prompts, tokenizer)
    later = second_turns(tasks or (), tokenizer)
    captured = capture(model, decode=False)
    limit = in_bytes(name, value, captured.layers, planned_context(rows, context, continuation), batch_size)
    settings = FitSettings(kv_bytes=limit, kl=None if name != "kl" else value, **asked)
    folder = None if resume is None else Path(resume)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)

    def hand_out(plan: Plan, how: str) -> None:
        if found is not None:
            found(budgets_of(plan), how)

    return fit_plan(captured, rows, settings, later, folder, progress, hand_out).with_plans(budgets_of)


def fit_quality(
    model: Any,
    calib: Calibration,
    prompts: Sequence[str | Tensor | Sequence[int]],
    kl: float = 0.02,
    context: int | None = None,
    multiple: int = 16,
    resolution: float = 0.01,
    continuation: int = 48,
    tokenizer: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> Budgets:
    """Find the plan of the fewest bytes whose held-out divergence from the full cache stays under a bound.

    Plans of several totals are solved from the calibration and measured in one pass over the prompts; rounds of them
    narrow the total down. The search assumes that, between the plans tried, more tokens never raise the divergence.

    Args:
        model: a transformers causal language model; it is not changed.
        calib: what `calibrate` measured for this model.
        prompts: strings, or token ids of shape `[S]` or `[1, S]`, which the calibration was not made from.
        kl: upper bound on the mean KL over prompts and their continuations, in nats.
        context: tokens of prompt to plan for; the calibration's longest by default.
        multiple: round capacities to multiples of this.
        resolution: how exactly to find the total, as a share of the full cache.
        continuation, tokenizer, progress: as in `verify`.

    Returns:
        the plan, with what was measured in its provenance.

    Raises:
        BudgetError: a bound that no plan keeps, or arguments out of range.
        ModelMismatchError, PromptError, UnsupportedModelError: as `verify`.
    """
    from xkv_fx.hf.capture import capture
    from xkv_fx.hf.prompts import tokenize
    from xkv_fx.planning.data.calibration_data import Calibration
    from xkv_fx.planning.fit_quality import smallest_plan

    if not isinstance(calib, Calibration):
        raise BudgetError(f"fit_quality takes an xkv_fx.Calibration; got {type(calib).__name__}")
    rows = tokenize(prompts, tokenizer)
    captured = capture(model, decode=False)
    return budgets_of(smallest_plan(captured, calib, rows, kl, context, multiple, resolution, continuation, progress))


@overload
def transform(
    model: Any,
    budgets: Plan,
    batch_size: int = 1,
    backend: str = "inductor",
    max_new_tokens: int = 0,
    check: bool = True,
    example_inputs: None = None,
    over_limit: bool = False,
    progress: Callable[[str], None] | None = None,
) -> BudgetedLM: ...


@overload
def transform(
    model: Any,
    budgets: Plan,
    batch_size: int = 1,
    backend: str = "inductor",
    max_new_tokens: int = 0,
    check: bool = True,
    *,
    example_inputs: tuple[Tensor, Tensor],
    over_limit: bool = False,
    progress: Callable[[str], None] | None = None,
) -> BudgetedModule: ...


def transform(
    model: Any,
    budgets: Plan,
    batch_size: int = 1,
    backend: str = "inductor",
    max_new_tokens: int = 0,
    check: bool = True,
    example_inputs: tuple[Tensor, Tensor] | None = None,
    over_limit: bool = False,
    progress: Callable[[str], None] | None = None,
) -> BudgetedLM | BudgetedModule:
    """Compile a causal language model with a KV cache of exactly the planned size.

    Args:
        model: a transformers causal language model, or with `example_inputs` any `torch.nn.Module`. It is not changed,
            and its weights are shared, not copied.
        budgets: capacities and policy; see `solve`, or `Budgets.full` for an exact cache.
        batch_size: rows after expansion: batch x beams or return sequences.
        backend: `"inductor"` compiles decode, `"eager"` runs the same graphs without a compiler.
        max_new_tokens: room for generated tokens under `eviction="append"`.
        check: compare the captured graph with the model on a short prompt before anything is built on it.
        example_inputs: `(input_ids, position_ids)`, int64 `[rows, S]` each, for a plain module that is called with them
            and returns logits `[rows, S, vocabulary]`.
        over_limit: allow more bytes than the plan was solved for with `kv_bytes`, which is refused otherwise.
        progress: called with what is done next, in words, at the start of each step that takes seconds.

    Returns:
        `xkv_fx.hf.generation.BudgetedLM`, with transformers' own `generate`; for a plain module
        `xkv_fx.lowering.plain.BudgetedModule`, with a plain greedy or sampling `generate`.

    Raises:
        BudgetError: the plan does not fit the model's layers, its scorer cannot be made or does not go with its
            eviction, a count is not a whole number of at least 1, or more would be allocated than the bytes that the
            plan was solved for (by another `batch_size`, dtype or `max_new_tokens`).
        ModelMismatchError: the plan was made for another model.
        UnsupportedModelError: the model cannot be captured exactly.
        BackendError: an unknown backend, or one that lacks its compiler.
    """
    from xkv_fx.capture.plain_module import capture_module
    from xkv_fx.hf.capture import capture
    from xkv_fx.hf.generation import BudgetedLM
    from xkv_fx.lowering.plain import BudgetedModule
    from xkv_fx.lowering.program import check_request, compile_program

    if isinstance(model, BudgetedLM | BudgetedModule):
        raise UnsupportedModelError("this model was transformed already; transform the model that it was made from")
    if not is_int(batch_size) or batch_size < 1:
        raise BudgetError(f"batch_size must be a whole number of at least 1; got {batch_size!r}")
    check_request(budgets, backend)  # before capture, which takes seconds
    say = progress if progress is not None else lambda what: None
    say("capturing the model")
    compiling = "compiling decode" if backend == "inductor" else "building the graphs"
    if example_inputs is not None:
        plain = capture_module(model, example_inputs, rows=batch_size, check=check)
        say(compiling)
        return BudgetedModule(budgets, compile_program(plain, budgets, backend, max_new_tokens, over_limit))
    captured = capture(model, rows=batch_size, check=check)
    say(compiling)
    program = compile_program(captured, budgets, backend, max_new_tokens, over_limit)
    capture_row = functools.cache(lambda: capture(model, rows=1, check=check, decode=False))
    return BudgetedLM(model.config, model.generation_config, budgets, program, capture_row)


def export(
    llm: BudgetedLM | BudgetedModule, folder: str | os.PathLike[str], target: str = "aoti", tokenizer: Any = None
) -> None:
    """Write an engine: a folder that generates without transformers, the model's code, or a compiler.

    Args:
        llm: what `transform` returned, whatever its backend.
        folder: a new folder; it appears whole or not at all.
        target: `"aoti"` compiles the graphs for this machine's device and instruction set and this torch, `"pt2"` saves
            them as `torch.export` does, which `load` reads with `trust=True` only. `"tensorrt"` is `"aoti"` on a GPU,
            but for decode, which Torch-TensorRT converts to one engine for this GPU.
        tokenizer: anything with transformers' `save_pretrained`; its files go with the engine.

    Raises:
        BackendError: an unknown target, a missing compiler, a scorer that cannot be traced, or caches that TensorRT
            would not update in place.
        UnsupportedModelError: not a transformed model, or one with weights that are no plain tensors.
        EngineError: the folder exists, or Torch-TensorRT is missing.
    """
    from xkv_fx.engines.export import export_engine

    export_engine(llm, folder, target, tokenizer)


def load(folder: str | os.PathLike[str], trust: bool = False) -> Engine:
    """Load an engine that `export` wrote. It needs torch alone.

    An engine is executable code. Sizes and hashes are checked before anything runs; they detect damage, not malice.

    Args:
        trust: also take the target `"pt2"`, which torch reads with pickle.

    Raises:
        FileFormatError: not an engine, damaged, incomplete, of a newer format, or one that contradicts itself.
        EngineError: built for another torch, device, instruction set or TensorRT; or a target that needs `trust`.
    """
    from xkv_fx.engines.engine import load_engine

    return load_engine(folder, trust, Budgets)

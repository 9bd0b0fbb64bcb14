"""Running an engine: no transformers, no capture, no pass, no op of ours."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from xkv_fx.budgets import Plan
from xkv_fx.engines.folder import check_files, check_packages
from xkv_fx.engines.form import Run
from xkv_fx.engines.forms import forms_of
from xkv_fx.engines.manifest import WEIGHTS, Manifest
from xkv_fx.engines.records import spec_of
from xkv_fx.engines.targets import TARGETS
from xkv_fx.errors import BackendError, EngineError, FileFormatError, PromptError
from xkv_fx.files import check_safetensors_size
from xkv_fx.lowering.describe import describe_layers, describe_recurrences
from xkv_fx.runtime.autocast import refuse_autocast
from xkv_fx.runtime.choose_tokens import token_chooser
from xkv_fx.runtime.decode_steps import generate_tokens
from xkv_fx.runtime.session import Session, refuse_unknown_tokens
from xkv_fx.runtime.state import CachePlan, GraphKind


class Engine:
    """A folder that `xkv_fx.export` wrote, loaded. Its sessions share code and weights.

    Attributes:
        manifest: what the folder says about itself.
    """

    def __init__(self, manifest: Manifest, weights: dict[str, Tensor], run: dict[GraphKind, Run]) -> None:
        self.manifest = manifest
        self._program = _EngineProgram(manifest, weights, run)

    @property
    def budgets(self) -> Plan:
        """The plan that it was made with."""
        return self.manifest.budgets

    @property
    def kv_bytes(self) -> int:
        """Bytes of K/V that each session allocates."""
        return self._program.plan.kv_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes of positions, scores and counters that each session allocates."""
        return self._program.plan.state_bytes

    @property
    def other_state_bytes(self) -> int:
        """Bytes of recurrent and convolution states that each session allocates."""
        return self._program.plan.other_state_bytes

    def new_session(self) -> Session:
        """An empty session; feed it prompts and turns with `feed`, decoded tokens with `step`."""
        return Session(self._program)

    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        attention_mask: Tensor | None = None,
        session: Session | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Feed a prompt or a turn, and decode after it.

        Of the model's generation config, the end and padding tokens are used; its sampling options and logits
        processors are not.

        Args:
            ids: int64 `[batch, prompt]`, the new tokens.
            max_new_tokens: how many are decoded at most, at least 1.
            attention_mask: `[batch, prompt]`, 0 for padding before or after a row's tokens.
            session: one of this engine's, to go on with; a new one when None. The last token that is returned has not
                been fed to it.
            do_sample: draw from the distribution instead of taking the likeliest token.
            temperature, top_k, top_p: of that distribution; refused without `do_sample`.
            generator: of the random numbers.

        Returns:
            int64 `[batch, prompt + new]`. A row that has ended is filled up with the padding token.

        Raises:
            PromptError: an argument out of its range, a token that the model does not have, or as `Session.feed`.
            CapacityError: more tokens than the plan holds, under a policy that may not evict.
            SessionError: a session of another engine.
        """
        if not do_sample and (temperature != 1.0 or top_k is not None or top_p is not None):
            raise PromptError("temperature, top_k and top_p are for sampling; give do_sample=True, too")
        choose = token_chooser(do_sample, temperature, top_k, generator, top_p)
        if session is None:
            session = self.new_session()
        session.check_owner(self._program)
        return generate_tokens(
            session,
            ids,
            max_new_tokens,
            attention_mask,
            choose,
            end_tokens=self.manifest.end_tokens,
            pad_token=self.manifest.pad_token,
        )

    def describe(self) -> str:
        """Target, machine, plan and layers, as text."""
        manifest = self.manifest
        machine, policy = manifest.machine, manifest.budgets.policy
        return "\n".join(
            (
                f"model         {manifest.model}",
                f"target        {manifest.target}, torch {machine.torch}, {machine.device} {machine.architecture} "
                f"{machine.instructions}",
                f"plan          {manifest.budgets.total_tokens} slots in {len(manifest.layers)} layers",
                f"policy        scorer {policy.scorer}, eviction {policy.eviction}",
                f"rows          {manifest.batch_size}",
                f"KV bytes      {self.kv_bytes:,} a session, and {self.state_bytes:,} for positions and counters",
                *describe_recurrences(self._program.plan),
                "",
                *describe_layers(self._program.plan),
            )
        )


class _EngineProgram:
    """Loaded packages; satisfies `runtime.session.Program`."""

    def __init__(self, manifest: Manifest, weights: dict[str, Tensor], run: dict[GraphKind, Run]) -> None:
        self._manifest = manifest
        self._run = run
        self._weights = {
            kind: [weights[name] for name in package.weights] for kind, package in manifest.packages.items()
        }
        self.plan: CachePlan = manifest.plan
        self.key = manifest.program
        self.max_positions = manifest.max_positions
        self.known_tokens = manifest.known_tokens

    def prefill(self, all_logits: bool) -> Callable[..., Tensor]:
        return self._prompt("prefill", all_logits)

    def extend(self, all_logits: bool) -> Callable[..., Tensor]:
        return self._prompt("extend", all_logits)

    def decode(self) -> Callable[..., Tensor]:
        return self._decode

    def _decode(self, ids: Tensor, positions: Tensor, *state: Tensor) -> Tensor:
        self._check_tokens(ids)
        with torch.no_grad():
            return self._run["decode"]([*self._weights["decode"], ids, positions, *state])

    def _prompt(self, kind: GraphKind, all_logits: bool) -> Callable[..., Tensor]:
        if all_logits:
            raise BackendError("an engine returns the logits of each row's last token only")

        def run(ids: Tensor, positions: Tensor, valid: Tensor, *state: Tensor) -> Tensor:
            self._check_tokens(ids)
            columns = ids.shape[1]
            if columns > self._manifest.longest:
                raise PromptError(f"{columns} columns are more than the {self._manifest.longest} of this engine")
            missing = self._manifest.shortest - columns
            if missing > 0:
                ids, positions = (torch.nn.functional.pad(tensor, (0, missing)) for tensor in (ids, positions))
                valid = torch.nn.functional.pad(valid, (0, missing), value=False)
            with torch.no_grad():
                return self._run[kind]([*self._weights[kind], ids, positions, valid, *state])

        return run

    def _check_tokens(self, ids: Tensor) -> None:
        """Compiled code would read past the embedding, and takes no notice of autocast or a part of it."""
        refuse_autocast(ids.device)
        refuse_unknown_tokens(ids, self.known_tokens)


def load_engine(folder: str | os.PathLike[str], trust: bool = False, plan_type: type[Plan] = Plan) -> Engine:
    """See `xkv_fx.load`; its plan will be of the class `plan_type`."""
    path = Path(folder)
    manifest = Manifest.load(path, plan_type)
    forms = forms_of(TARGETS[manifest.target])
    try:
        manifest.machine.check()
        for form in forms.values():
            form.check_runtime(manifest)
    except EngineError as error:
        raise EngineError(f"{path}: {error!s:.1000}") from error
    if any(form.pickled for form in forms.values()) and not trust:
        raise EngineError(
            f"{path}: torch reads the target {manifest.target!r} with pickle, which may run any code; load it with "
            "trust=True if you know where it comes from, or export it with target='aoti'"
        )
    check_files(path, manifest)
    check_packages(path, manifest)
    weights = _load_weights(path / WEIGHTS, manifest)
    run = {kind: form.load(path / manifest.packages[kind].file, manifest) for kind, form in forms.items()}
    return Engine(manifest, weights, run)


def _load_weights(path: Path, manifest: Manifest) -> dict[str, Tensor]:
    """The weights, mapped from the file where the device is the CPU.

    Raises:
        FileFormatError: the file does not hold what the manifest says.
    """
    try:
        check_safetensors_size(path, manifest.files[WEIGHTS].size)
        with safetensors.safe_open(os.fspath(path), framework="pt", device=manifest.machine.device) as file:
            if set(file.keys()) != {spec.name for spec in manifest.weights}:
                raise FileFormatError("its tensors are not those of the manifest")
            weights = {spec.name: file.get_tensor(spec.name) for spec in manifest.weights}
        for spec in manifest.weights:
            tensor = weights[spec.name]
            if spec_of(spec.name, tuple(tensor.shape), tensor.dtype) != spec:
                raise FileFormatError(f"{spec.name} is {tensor.dtype} of {list(tensor.shape)}, not as in the manifest")
    except (FileFormatError, safetensors.SafetensorError) as error:
        raise FileFormatError(f"{path}: {error}") from error
    return weights

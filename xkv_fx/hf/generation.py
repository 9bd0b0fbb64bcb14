"""The transformed model: transformers' own `generate` over budgeted graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from xkv_fx.budgets import Plan
from xkv_fx.capture.captured import CapturedModel
from xkv_fx.errors import BackendError, PromptError, SessionError
from xkv_fx.hf.answers import Answers
from xkv_fx.hf.cache import SessionCache
from xkv_fx.hf.cache_name import CACHE_NAME, CACHE_NAMES, cache_given
from xkv_fx.hf.call_checks import (
    check_conversation,
    refuse_arguments,
    refuse_no_cache,
    refuse_nothing_new,
    refuse_options,
    refuse_rows_without_last_token,
    refuse_tokens_fed_before,
    token_ids,
    valid_tokens,
    with_token_ids,
)
from xkv_fx.hf.many import Asked, check_counts
from xkv_fx.lowering.budgeted import Budgeted
from xkv_fx.lowering.program import CompiledProgram, PromptProgram, one_row_prompts
from xkv_fx.runtime.many.loop import ServingLoop
from xkv_fx.runtime.many.request import Request, Settings
from xkv_fx.runtime.many.rows import Rows
from xkv_fx.runtime.many.staging import Staging
from xkv_fx.runtime.session import refuse_rows_of_padding

_OF_GENERATE = ("tokenizer", "assistant_tokenizer", "assistant_model", "streamer", "synced_gpus")
"""Arguments of `generate` that transformers hands on to the model, and that its own models ignore."""


class BudgetedLM(Budgeted, GenerationMixin):
    """What `xkv_fx.transform` makes of a transformers model."""

    main_input_name = "input_ids"
    _is_stateful = True  # generate then refuses assisted decoding, which would have to take tokens back
    _supports_cache_class = True

    def __init__(
        self,
        config: PreTrainedConfig,
        generation_config: GenerationConfig,
        budgets: Plan,
        program: CompiledProgram,
        capture_row: Callable[[], CapturedModel] | None = None,
    ) -> None:
        """`capture_row` captures the same model for one row; without it, `generate_many` needs a program of one."""
        super().__init__(budgets, program)
        self.config = config
        self.generation_config = _own_copy(generation_config)
        self._capture_row = capture_row
        self._prompts: PromptProgram | None = None

    def new_session(self) -> SessionCache:
        """An empty session; any number of them share the weights and graphs."""
        return SessionCache(self.program)

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The generation config's."""
        ends = self.generation_config.eos_token_id
        return () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)

    @property
    def pad_token(self) -> int:
        """The generation config's; without one, as in transformers, the first end token."""
        pad = self.generation_config.pad_token_id
        return next(iter(self.end_tokens), 0) if pad is None else pad

    def _remade(self, budgets: Plan, program: CompiledProgram) -> BudgetedLM:
        return BudgetedLM(self.config, self.generation_config, budgets, program, self._capture_row)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SessionCache | None = None,
        cache: SessionCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        decoding: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Feed tokens to a session.

        Args:
            input_ids: int64 `[rows, S]`, the new tokens.
            attention_mask: `[rows, S]`, or of all columns that the session was fed and these S, 0 for padding.
            position_ids: int64 `[rows, S]`; counted from the attention mask when None.
            past_key_values, cache: the session, under either of transformers' names, whichever version is installed; a
                new one when None.
            logits_to_keep: 0 for the logits of every token, 1 for each row's last valid one.
            decoding: take `input_ids` as one decoded token a row, none of them padding, instead of a prompt or a turn.

        Raises:
            PromptError, CapacityError: see `Session.feed`.
            SessionError: a session of another model, another kind of cache, two sessions under two names, or a mask
                over columns that the session was fed otherwise.
        """
        refuse_no_cache(use_cache)
        refuse_arguments(kwargs, self.config)
        session = self._session({"past_key_values": past_key_values, "cache": cache})
        if session is None:
            session = self.new_session()
            refuse_rows_of_padding(attention_mask)
        if input_ids is None:
            raise PromptError("give input_ids; inputs_embeds are not supported")
        if return_dict is False:
            raise PromptError("return_dict=False is not supported by a transformed model; it returns an output object")
        if logits_to_keep not in (0, 1):
            raise PromptError(f"logits_to_keep must be 0 (all) or 1 (the last); got {logits_to_keep!r}")
        input_ids = token_ids(input_ids).to(self.device)
        valid = (
            None if attention_mask is None else valid_tokens(session, attention_mask.to(self.device) != 0, input_ids)
        )
        if decoding:
            if valid is not None and not bool(valid.all()):
                raise PromptError("a row has padding for its next token; decode takes one token a row")
            logits = session.step(input_ids, position_ids)
        else:
            logits = session.feed(input_ids, position_ids, valid, all_logits=logits_to_keep == 0)
        held: dict[str, Any] = {CACHE_NAME: session}
        return CausalLMOutputWithPast(logits=cast(Any, logits), **held)

    def _session(self, arguments: dict[str, Any]) -> SessionCache | None:
        """The session among a call's arguments, if it is one of this model's; None without."""
        session = cache_given(arguments)
        if session is None:
            return None
        if not isinstance(session, SessionCache):
            raise SessionError(
                f"a {type(session).__name__} has no bounded memory; pass a session from llm.new_session() instead"
            )
        session.session.check_owner(self.program)
        return session

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own `GenerationMixin.generate`, every option of it.

        `past_key_values`, or `cache` as transformers 5.24 calls it, may be a session of this model, with the whole
        conversation as input each time; without one, generation starts from an empty cache. Either name is taken,
        whichever version is installed. Returns token ids int64 `[rows, prompt + new]`, or transformers' output object
        with `return_dict_in_generate=True`.

        Raises:
            PromptError, CapacityError: see `forward`; and for `inputs_embeds`, for `position_ids`, which the session
                counts, for a conversation in which nothing is new to its session, and for more new tokens than there is
                room for.
            SessionError: see `forward`; and for a conversation that does not begin with what its session was fed.
        """
        args, kwargs = with_token_ids(args, kwargs)
        refuse_options(args, kwargs, self.generation_config)
        session = self._session(kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
        if session is not None:
            kwargs[CACHE_NAME] = session
        return GenerationMixin.generate(self, *args, **kwargs)  # type: ignore[arg-type]

    def generate_many(
        self,
        requests: Iterable[Request | str | Tensor | Sequence[int]],
        max_new_tokens: int = 64,
        *,
        tokenizer: Any = None,
        stop: str | Sequence[str] = (),
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        end_tokens: Collection[int] | None = None,
        prefix: str | Tensor | Sequence[int] | None = None,
        prefill_chunk_size: int | None = None,
        prompt_tokens_per_step: int = 256,
        in_order: bool = True,
        progress: bool | Callable[[int, int], None] = False,
    ) -> Answers:
        """Answer any number of requests of any lengths with the rows of this model, each row at a request of its own.

        A row that ends is filled again at once: the next prompt is fed in one more row beside the batch, a layer at a
        time, while the batch decodes. Nothing is compiled anew. Each answer is the one that the request gets alone,
        from `generate` with the same `prefill_chunk_size`; beyond the K/V of the batch, that of one row is allocated,
        and of another one with a prefix.

        Args:
            requests: strings (with a tokenizer), token ids, or `xkv_fx.Request`s with settings of their own; any
                iterable, from which each is taken when it can be fed.
            max_new_tokens: how many tokens each generates at most.
            tokenizer: of strings, for the answers' text, and for stop strings.
            stop: strings that end an answer; they are not part of its text.
            do_sample: draw from the distribution instead of taking the likeliest token.
            temperature, top_k, top_p: of that distribution.
            seed: of the random numbers: request i draws with `seed + i`, whatever runs beside it.
            end_tokens: tokens that end an answer; the generation config's when None.
            prefix: what many prompts begin with, fed once. Those that begin with its tokens go on from a copy, and all
                others are fed whole. With budgets that evict, survivors are chosen behind the prefix, and again behind
                the rest of the prompt.
            prefill_chunk_size: feed prompts so many tokens at a time, as in transformers' `generate`. That takes less
                memory, and with budgets that evict, survivors are chosen again behind each chunk. Whole when None.
            prompt_tokens_per_step: how much of prompts is fed between two decode steps, in tokens through the whole
                model: for how long a running row may have to wait.
            in_order: answers come in the order of their requests, instead of as they end.
            progress: draw a bar, or call this as `progress(done, known)` after each answer.

        Returns:
            an iterator of `xkv_fx.Answer`s. Work is done while it is asked for the next one; `cancel(index)` and
            `close()` end requests early.

        Raises:
            PromptError: at once, for settings out of their range. What is wrong with a request (too long, nothing in
                it, unknown tokens) fails that request only, and is its answer's `error`.
            ModelMismatchError: the weights were changed after the model was transformed.
        """
        settings = Settings.of(
            stop, max_new_tokens=max_new_tokens, do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p,
            seed=seed,
        )  # fmt: skip
        ends = frozenset(self.end_tokens if end_tokens is None else end_tokens)
        asked = Asked(requests, settings, ends, tokenizer, self.program.known_tokens, self.device)
        shared = asked.prefix(prefix)
        check_counts(prefill_chunk_size=prefill_chunk_size, prompt_tokens_per_step=prompt_tokens_per_step)

        def loop(cancelled: set[int]) -> ServingLoop:
            staging = Staging(self._one_row(), prefill_chunk_size, shared)
            return ServingLoop(Rows(self.program), staging, asked.jobs(), prompt_tokens_per_step, cancelled)

        return Answers(loop, asked.known, in_order, progress)

    def _one_row(self) -> PromptProgram:
        """What feeds prompts to one row; made when it is first asked for."""
        if self._prompts is None:
            own = self.program.graphs.captured
            own.check_weights()
            if own.rows > 1:
                if self._capture_row is None:
                    raise BackendError("generate_many needs a model of one row, or one that xkv_fx.transform made")
                own = self._capture_row()
            self._prompts = one_row_prompts(self.program, own)
        return self._prompts

    def prepare_inputs_for_generation(  # type: ignore[override]  # parameters differ between versions of transformers
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        is_first_iteration: bool = False,
        logits_to_keep: int = 1,
        prompt_columns: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """transformers' hook: slice what is new, and say whether it is a prompt or a decoded token.

        `prompt_columns` is what `_prepare_cache_for_generation` put among the arguments.
        """
        kwargs = {name: value for name, value in kwargs.items() if name not in _OF_GENERATE}
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:] if next_sequence_length > 0 else input_ids[:, :0]
        # Older versions of transformers do not say that a chunk is part of a prompt.
        decoding = not is_first_iteration and next_sequence_length is not None
        if not decoding and prompt_columns is not None:
            refuse_tokens_fed_before(kwargs[CACHE_NAME].get_seq_length(), input_ids.shape[1], prompt_columns)
        return {
            **kwargs,
            "input_ids": input_ids,
            "attention_mask": None if decoding else attention_mask,
            "position_ids": None,  # transformers counts from the last column, which may be padding
            "logits_to_keep": 1,
            "decoding": decoding,
        }

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """transformers' hook: without a cache of the user's, start from an empty session."""
        refuse_no_cache(generation_config.use_cache)
        if generation_config.cache_implementation is not None:
            raise SessionError(
                f"cache_implementation={generation_config.cache_implementation!r} cannot be chosen: the cache of a "
                "transformed model is its budgets'; leave it out, or set it to None in the generation_config"
            )
        session = self._session(model_kwargs)
        mask, chunk = model_kwargs.get("attention_mask"), generation_config.prefill_chunk_size
        if session is None:
            session = self.new_session()
        refuse_rows_of_padding(mask)
        held = session.get_seq_length()
        # transformers drops a mask of ones and notes its length, which counts the whole conversation.
        columns = generation_config._mask_length if mask is None else mask.shape[1]
        refuse_nothing_new(held, columns, chunk)
        refuse_rows_without_last_token(mask, held, chunk)
        model_kwargs[CACHE_NAME], model_kwargs["prompt_columns"] = session, columns

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """transformers' hook: feed a prompt, or the new part of a conversation. All that it could be refused for is
        known by now, so nothing is fed before a refusal."""
        session, mask = model_kwargs[CACHE_NAME], model_kwargs.get("attention_mask")
        valid = None if mask is None else mask != 0
        check_conversation(session, input_ids, valid, model_kwargs["prompt_columns"], generation_config.max_length)
        return GenerationMixin._prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs)  # type: ignore[arg-type]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """What `generate_batch` and transformers' other ways into continuous batching begin with.

        Raises:
            BackendError: always.
        """
        raise BackendError(
            "transformers' continuous batching (generate_batch and the like) brings a paged cache of its own, for "
            "which no budgets hold; generate_many() keeps the rows of this model busy with any number of prompts"
        )

    generate_batch = init_continuous_batching
    continuous_batching_context_manager = init_continuous_batching

    def is_remote_code(self) -> bool:
        """Part of what `GenerationMixin` asks of a model."""
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """Part of what `GenerationMixin` asks of a model."""
        return {}

    def set_experts_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Part of what `GenerationMixin` asks of a model; the graphs are fixed."""

    def can_generate(self) -> bool:
        """Part of what `GenerationMixin` asks of a model."""
        return True


def _own_copy(config: GenerationConfig) -> GenerationConfig:
    """A copy, so that setting something on it leaves the model's own unchanged. It drops settings that some models come
    with and no caller asked for: a cache that is switched off (MPT), or a kind of cache."""
    config = copy.deepcopy(config)
    config.cache_implementation = config.cache_config = None
    if config.use_cache is False:
        config.use_cache = True
    return config

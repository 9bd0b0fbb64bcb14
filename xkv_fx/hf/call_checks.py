"""What a call of a transformed model is refused for: arguments, options, and how it goes on from its session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from xkv_fx.errors import PromptError, SessionError
from xkv_fx.hf.cache import SessionCache
from xkv_fx.hf.cache_name import CHUNKS_HOLD_NEW_TOKENS, TRANSFORMERS

_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
"""Options of `generate` that choose assisted generation."""


def refuse_options(args: Sequence[Any], options: Mapping[str, Any], own: GenerationConfig) -> None:
    """Refuse what a call of `generate` may not ask for.

    Args:
        args, options: the call's positional and named arguments.
        own: the model's generation config, for a call that brings none.
    """
    if options.get("is_assistant") or getattr(options.get("generation_config"), "is_assistant", False):
        raise SessionError(
            "a transformed model cannot be the assistant_model of another: tokens that are turned down would have "
            "to be taken back from its cache; give the model that it was made from"
        )
    config = options.get("generation_config") or own
    assisted = [name for name in _ASSISTED if options.get(name, getattr(config, name, None))]
    if assisted:
        raise SessionError(
            f"assisted generation takes tokens back, which a budgeted cache cannot; leave {' and '.join(assisted)} out"
        )
    if options.get("position_ids") is not None:
        raise PromptError("leave position_ids out: the session counts the valid tokens of each row")
    if options.get("inputs_embeds") is not None:
        raise PromptError("inputs_embeds is not supported by a transformed model; give input_ids")
    given = (*args[:1], options.get("inputs"), options.get("input_ids"))
    ids, mask = next((value for value in given if value is not None), None), options.get("attention_mask")
    if isinstance(ids, Tensor) and isinstance(mask, Tensor) and mask.shape[-1] < ids.shape[-1]:
        raise PromptError(f"the attention mask has {mask.shape[-1]} columns for {ids.shape[-1]} tokens a row")


def with_token_ids(args: Sequence[Any], options: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call of `generate` with the token ids that they hold, under any name, as int64.

    Raises:
        PromptError: something else than token ids `[rows, S]`.
    """
    named = {name: token_ids(options[name]) for name in ("inputs", "input_ids") if options.get(name) is not None}
    first = tuple(value if value is None else token_ids(value) for value in args[:1])
    return (*first, *args[1:]), {**options, **named}


def token_ids(given: Any) -> Tensor:
    """Token ids as int64 `[rows, S]`.

    Raises:
        PromptError: they are something else.
    """
    if not isinstance(given, Tensor):
        raise PromptError(
            f"a transformed model takes token ids, a tensor int64 [rows, S]; got a {type(given).__name__}. From text "
            "they come by llm.generate(**tokenizer(text, return_tensors='pt'))"
        )
    if given.dim() != 2:
        raise PromptError(f"token ids are int64 [rows, S]; got the shape {list(given.shape)}")
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise PromptError(f"token ids are whole numbers, int64 [rows, S]; got {given.dtype}")
    return given.long()


def refuse_no_cache(use_cache: bool | None) -> None:
    """Refuse to run without a cache."""
    if use_cache is False:
        raise SessionError("use_cache=False makes no sense for a model that lives on its cache; leave it out")


def valid_tokens(session: SessionCache, mask: Tensor, ids: Tensor) -> Tensor:
    """Which of the new tokens `ids` `[rows, S]` are not padding, by a mask over them or over the conversation."""
    fed, new, columns = session.fed, ids.shape[-1], mask.shape[-1]
    if columns not in (new, fed + new):
        raise PromptError(
            f"the attention mask has {columns} columns; give it {new}, for the new tokens, or {fed + new}, for all"
        )
    if columns > new and mask.shape[0] == session.batch_size:
        session.session.check_history(None, mask)
    return mask[:, columns - new :]


def check_conversation(session: SessionCache, ids: Tensor, valid: Tensor | None, columns: int, longest: int) -> None:
    """Refuse a conversation that does not continue its session, or that would grow too long.

    Args:
        ids: int64 `[rows, columns]`, the whole conversation, or what is new of it.
        valid: bool `[rows, columns]`, False for padding; None without any.
        columns: of the whole conversation.
        longest: tokens that `ids` may grow to.
    """
    fed, given = session.fed, ids.shape[1]
    if given not in (columns, columns - fed):
        raise PromptError(
            f"got {given} tokens a row and an attention mask of {columns} columns for a session that holds {fed}; give "
            "the whole conversation, or what is new of it with a mask of the whole"
        )
    if ids.shape[0] == session.batch_size:  # another number of rows is refused where it is fed
        session.session.check_history(ids if given == columns else None, valid)
        new = ids[:, given - (columns - fed) :]
        session.session.check_room(longest - given, new, None if valid is None else valid[:, fed:])


def refuse_nothing_new(held: int, columns: int, chunk: int | None) -> None:
    """Refuse a conversation whose new tokens transformers would not find."""
    if held and columns <= held:
        raise PromptError(
            f"the session holds {held} tokens a row, and the conversation given has {columns}: nothing in it is new. "
            "Give the whole conversation each time, what is new at its end, or start with llm.new_session()"
        )
    if held and chunk and not CHUNKS_HOLD_NEW_TOKENS:
        raise SessionError(
            f"transformers {TRANSFORMERS} feeds a conversation from its start again when prefill_chunk_size is given; "
            "leave that out for a session that holds tokens, or install transformers 5.21 or later"
        )


def refuse_tokens_fed_before(held: int, new: int, columns: int) -> None:
    """Refuse to feed tokens that the session holds already, as unknown versions of transformers might."""
    if held + new > columns:
        raise SessionError(
            f"transformers {TRANSFORMERS} would feed {new} tokens a row to a session that holds {held} of the "
            f"conversation's {columns}, so some of them twice; install a version of transformers that xkv_fx supports"
        )


def refuse_rows_without_last_token(mask: Tensor | None, fed: int, chunk: int | None) -> None:
    """Refuse a prompt with a row that has no token in the part fed last, whose logits generation starts from."""
    new = 0 if mask is None else mask.shape[1] - fed
    last = new if not chunk else (new - 1) % chunk + 1
    if mask is not None and new > 0 and not bool((mask[:, -last:] != 0).any(-1).all()):
        raise PromptError(
            f"a row of the prompt has no token among the last {last} columns, which are fed at once; pad on the left"
        )


def refuse_arguments(kwargs: dict[str, Any], config: Any) -> None:
    """Refuse further arguments of `forward`, and outputs that the model's config asks for."""
    for name in ("inputs_embeds", "output_attentions", "output_hidden_states", "labels", "head_mask"):
        value = kwargs.pop(name, None)
        if value is not None and value is not False:
            raise PromptError(f"{name} is not supported by a transformed model")
        if value is None and name.startswith("output_") and getattr(config, name, False):
            raise PromptError(f"{name} is not supported by a transformed model; set it to False in the model's config")
    unknown = sorted(name for name, value in kwargs.items() if value is not None)
    if unknown:
        raise PromptError(f"unknown arguments: {', '.join(unknown)}")

"""Which arguments of transformers' `generate`, and which names of its `Cache`, are right: each is tried.

    python -m xkv_fx.evaluation.coverage.generation

An argument is right when the transformed model, with room for all tokens, generates the very tokens that transformers'
own model does; it is refused when an error of ours says why, and refused by both when transformers' own model takes it
no more than ours. A name of `Cache` is right when a session answers as transformers' `DynamicCache` does after the same
tokens, and other where that is meant to be. Whatever the installed transformers has and nobody thought of is not tried.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
import transformers
import typer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    MaxLengthCriteria,
    NoRepeatNGramLogitsProcessor,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

import xkv_fx
from xkv_fx.errors import XkvError
from xkv_fx.evaluation.coverage.classify import TOLERANCE, one_line, random_prompt
from xkv_fx.evaluation.coverage.tiny import VOCABULARY, tiny_llama
from xkv_fx.hf.generation import BudgetedLM

PROMPT, STEPS = 12, 5
_CELL = 200
Outcome = Literal["right", "other", "refused", "refused by both", "failed", "not tried"]


class Silent(BaseStreamer):
    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


def _tokenizer() -> PreTrainedTokenizerFast:
    """Of words that are called after their ids."""
    words = {"abcdef": 0, **{f"w{token}": token for token in range(1, VOCABULARY)}}  # the first is transformers' probe
    backend = Tokenizer(WordLevel(words, unk_token="w1"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="w2", pad_token="w1", unk_token="w1")


_SAMPLED: dict[str, Any] = {"do_sample": True}
_BEAMS: dict[str, Any] = {"num_beams": 2}
_OUTPUTS: dict[str, Any] = {"return_dict_in_generate": True}
ARGUMENTS: Mapping[str, dict[str, Any]] = {
    "attention_mask": {"attention_mask": torch.cat((torch.zeros(1, 3), torch.ones(1, PROMPT - 3)), 1).long()},
    "inputs_embeds": {"inputs_embeds": torch.zeros(1, 3, 32)},
    "position_ids": {"position_ids": torch.arange(PROMPT)[None]},
    "tokenizer": {"tokenizer": object()},
    "assistant_tokenizer": {"assistant_tokenizer": object()},
    "logits_to_keep": {"logits_to_keep": 1},
    "generation_config": {"generation_config": GenerationConfig(max_new_tokens=3, do_sample=False)},
    "logits_processor": {"logits_processor": [NoRepeatNGramLogitsProcessor(2)]},
    "stopping_criteria": {"stopping_criteria": [MaxLengthCriteria(PROMPT + 3)]},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda batch, ids: [4, 5, 6]},
    "synced_gpus": {"synced_gpus": False},
    "streamer": {"streamer": Silent()},
    "negative_prompt_ids": {"guidance_scale": 1.5, "negative_prompt_ids": random_prompt(4)},
    "negative_prompt_attention_mask": {
        "guidance_scale": 1.5,
        "negative_prompt_ids": random_prompt(4),
        "negative_prompt_attention_mask": torch.ones(1, 4).long(),
    },
    "custom_generate": {"custom_generate": lambda model, input_ids, **more: input_ids},
    "max_length": {"max_new_tokens": None, "max_length": PROMPT + 4},
    "max_new_tokens": {"max_new_tokens": 5},
    "min_length": {"eos_token_id": list(range(VOCABULARY)), "min_length": PROMPT + 3},
    "min_new_tokens": {"eos_token_id": list(range(VOCABULARY)), "min_new_tokens": 3},
    "early_stopping": {**_BEAMS, "early_stopping": True},
    "max_time": {"max_time": 60.0},
    "stop_strings": {"stop_strings": [f"w{token}" for token in range(3, 30)], "tokenizer": _tokenizer()},
    "do_sample": _SAMPLED,
    "num_beams": {"num_beams": 2},
    "use_mtp": {"use_mtp": True},
    "use_cache": {"use_cache": False},
    "cache_implementation": {"cache_implementation": "static"},
    "cache_config": {"cache_config": {"nbits": 4}},
    "max_cache_len": {"max_cache_len": 64},
    "temperature": {**_SAMPLED, "temperature": 0.6},
    "top_k": {**_SAMPLED, "top_k": 5},
    "top_p": {**_SAMPLED, "top_p": 0.8},
    "min_p": {**_SAMPLED, "min_p": 0.05},
    "top_h": {**_SAMPLED, "top_h": 0.4},
    "typical_p": {**_SAMPLED, "typical_p": 0.8},
    "epsilon_cutoff": {**_SAMPLED, "epsilon_cutoff": 0.02},
    "eta_cutoff": {**_SAMPLED, "eta_cutoff": 0.02},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
    "length_penalty": {**_BEAMS, "length_penalty": 2.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[5], [6, 7]]},
    "renormalize_logits": {**_SAMPLED, "renormalize_logits": True},
    "forced_bos_token_id": {"forced_bos_token_id": 5},
    "forced_eos_token_id": {"forced_eos_token_id": 5},
    "remove_invalid_values": {"remove_invalid_values": True},
    "exponential_decay_length_penalty": {"eos_token_id": 5, "exponential_decay_length_penalty": (2, 1.5)},
    "suppress_tokens": {"suppress_tokens": list(range(3, 20))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(3, 20))},
    "sequence_bias": {"sequence_bias": [[[5], 2.0]]},
    "token_healing": {"token_healing": True, "tokenizer": _tokenizer()},
    "guidance_scale": {"guidance_scale": 1.5},
    "watermarking_config": {"watermarking_config": {"bias": 2.5, "seeding_scheme": "lefthash", "greenlist_ratio": 0.5}},
    "num_return_sequences": {**_SAMPLED, "num_return_sequences": 2},
    "output_attentions": {**_OUTPUTS, "output_attentions": True},
    "output_hidden_states": {**_OUTPUTS, "output_hidden_states": True},
    "output_scores": {**_OUTPUTS, "output_scores": True},
    "output_logits": {**_OUTPUTS, "output_logits": True},
    "return_dict_in_generate": _OUTPUTS,
    "pad_token_id": {"eos_token_id": list(range(3, 30)), "pad_token_id": 2},
    "bos_token_id": {"bos_token_id": 1},
    "eos_token_id": {"eos_token_id": list(range(3, 30))},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 2},
    "decoder_start_token_id": {"decoder_start_token_id": 5},
    "is_assistant": {"is_assistant": True},
    "num_assistant_tokens": {"num_assistant_tokens": 3},
    "num_assistant_tokens_schedule": {"num_assistant_tokens_schedule": "constant"},
    "assistant_confidence_threshold": {"assistant_confidence_threshold": 0.3},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
    "max_matching_ngram_size": {"max_matching_ngram_size": 2},
    "assistant_early_exit": {"assistant_early_exit": 1},
    "assistant_lookbehind": {"assistant_lookbehind": 5},
    "target_lookbehind": {"target_lookbehind": 5},
    "assistant_ensemble_weight": {"assistant_ensemble_weight": 0.5},
    "speculation_type": {"speculation_type": "dflash"},
    "compile_config": {"compile_config": transformers.CompileConfig()},
    "disable_compile": {"disable_compile": True},
    "low_memory": {"low_memory": True},
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
    "dola_layers": {"dola_layers": "low"},
    "diversity_penalty": {**_BEAMS, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "num_beam_groups": {**_BEAMS, "num_beam_groups": 2},
    "constraints": {**_BEAMS, "constraints": []},
    "force_words_ids": {**_BEAMS, "force_words_ids": [[5]]},
    "prefill_chunk_size": {"prefill_chunk_size": 5},
}
"""What each argument is tried with, besides `max_new_tokens` and greedy decoding."""
_NOT_OF_ONE_CALL = ("inputs", "kwargs", "self", "transformers_version", "continuous_batching_config")
"""Names that are no options of one generation: positional input, and what other methods read."""

NAMES: Mapping[str, tuple[Any, ...] | None] = {
    "activate_past_recording": (), "batch_repeat_interleave": (2,), "batch_select_indices": (torch.tensor([1, 1]),),
    "batch_size": None, "crop": (-1,), "early_initialization": (2, 2, 8, torch.float32, "cpu"),
    "get_conv_state": (0,), "get_mask_sizes": (3, 0), "get_max_cache_shape": (), "get_max_length": (),
    "get_query_offset": (0,), "get_recurrent_state": (0,), "get_seq_length": (), "has_previous_state": (),
    "is_compileable": None, "is_croppable": None, "is_dummy": None, "is_initialized": None, "is_linear": None,
    "is_recording_past": (0,), "is_sliding": None, "max_batch_size": None, "max_cache_len": None, "offload": (0,),
    "prefetch": (0,), "reorder_cache": (torch.tensor([1, 0]),), "reset": (),
    "update": (torch.zeros(2, 2, 1, 8), torch.zeros(2, 2, 1, 8), 0),
    "update_conv_state": (torch.zeros(1), 0), "update_indexer": (torch.zeros(1), 0),
    "update_recurrent_state": (torch.zeros(1), 0),
}  # fmt: skip
"""What each method of transformers' `Cache` is called with; None for a property."""
_OTHERWISE: Mapping[str, str] = {
    **dict.fromkeys(("get_max_cache_shape", "get_max_length", "max_cache_len"), "tokens that there is room for"),
    "batch_size": "rows are fixed",
    "is_croppable": "evicted tokens are gone",
}
"""Names whose answers are meant to differ, and why."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one argument or name, and why it is not right."""

    name: str
    outcome: Outcome
    reason: str = ""


def argument_names() -> tuple[str, ...]:
    """Everything that the installed transformers' `generate` takes, and what its models' forward adds to that."""
    parameters = inspect.signature(GenerationMixin.generate).parameters
    config = (name for name in vars(GenerationConfig()) if not name.startswith("_"))
    further = ("attention_mask", "inputs_embeds", "position_ids", "past_key_values", "tokenizer", "logits_to_keep")
    return tuple(sorted({*parameters, *config, *further} - set(_NOT_OF_ONE_CALL)))


def cache_names() -> tuple[str, ...]:
    """Every public name of the installed transformers' `Cache`."""
    return tuple(name for name in dir(Cache) if not name.startswith("_"))


class Pair:
    """A tiny model, and what `transform` makes of it with room for everything."""

    def __init__(self) -> None:
        self.model = tiny_llama()
        self._transformed: dict[int, BudgetedLM] = {}

    def transformed(self, rows: int) -> BudgetedLM:
        if rows not in self._transformed:
            budgets = xkv_fx.Budgets.full(2, 4 * (PROMPT + STEPS))
            self._transformed[rows] = xkv_fx.transform(self.model, budgets, batch_size=rows, backend="eager")
        return self._transformed[rows]

    def judge_argument(self, name: str) -> Verdict:
        """Generate with an argument, by both; no exception leaves this function."""
        made: dict[str, dict[str, Any]] = {
            "assistant_model": {"assistant_model": self.model},
            "past_key_values": {"past_key_values": DynamicCache()},
        }
        options = made.get(name, ARGUMENTS.get(name))
        if options is None:
            return Verdict(name, "not tried")
        rows = options.get("num_beams", 1) * options.get("num_return_sequences", 1)
        theirs, ours = _generated(self.model, options), _generated(self.transformed(rows), options)
        return _compared(name, ours, theirs)

    def judge_name(self, name: str) -> Verdict:
        """Ask a session and transformers' cache, both fed the same; no exception leaves this function."""
        if name not in NAMES:
            return Verdict(name, "not tried")
        theirs = _asked(self.model, DynamicCache(config=self.model.config), name)
        ours = _asked(self.transformed(2), self.transformed(2).new_session(), name)
        if name in _OTHERWISE and ours != theirs:
            return Verdict(name, "other", f"{ours.answer}: {_OTHERWISE[name]}")
        return _compared(name, ours, theirs)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a call gave: an answer, or the error that it raised."""

    answer: Any = None
    error: Exception | None = None


def _compared(name: str, ours: Answer, theirs: Answer) -> Verdict:
    if ours.error is None:
        alike = theirs.error is None and _same(ours.answer, theirs.answer)
        instead = theirs.answer if theirs.error is None else theirs.error
        return Verdict(name, "right") if alike else Verdict(name, "failed", f"{ours.answer} instead of {instead}")
    if theirs.error is not None:
        return Verdict(name, "refused by both", one_line(ours.error, _CELL))
    if isinstance(ours.error, XkvError):
        return Verdict(name, "refused", one_line(ours.error, _CELL))
    return Verdict(name, "failed", f"{type(ours.error).__name__}: {one_line(ours.error, _CELL)}")


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, Tensor):
        return ours.shape == theirs.shape and bool(torch.allclose(ours.double(), theirs.double(), atol=TOLERANCE))
    if isinstance(theirs, tuple | list):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    return bool(ours == theirs)


def _generated(model: Any, options: dict[str, Any]) -> Answer:
    """Tokens, and scores where they were asked for."""
    torch.manual_seed(0)
    given = {"input_ids": random_prompt(PROMPT), "max_new_tokens": STEPS, "do_sample": False, **options}
    if "inputs_embeds" in options:
        del given["input_ids"]
    try:
        output = model.generate(**given)
    except Exception as error:  # of either side: how they compare is the finding
        return Answer(error=error)
    if isinstance(output, Tensor):
        return Answer(output)
    return Answer([output.sequences, *(output.get("scores") or ()), *(output.get("logits") or ())])


def _asked(model: Any, cache: Any, name: str) -> Answer:
    """What a cache says that has been fed a prompt; for what changes it, the logits of three more tokens."""
    ids = random_prompt(2 * PROMPT).view(2, PROMPT)
    arguments = NAMES[name]
    with torch.no_grad():
        model(ids, past_key_values=cache)
        try:
            answer = getattr(cache, name)
            if arguments is not None:
                answer = answer(*arguments)
            if arguments is not None and answer is None:
                rows = 2 if name == "batch_repeat_interleave" else 1
                answer = model(ids[:, :3].repeat(rows, 1), past_key_values=cache).logits
        except Exception as error:  # of either side: how they compare is the finding
            return Answer(error=error)
    return Answer(answer)


def as_text(title: str, verdicts: Iterable[Verdict]) -> str:
    """Markdown: the names that are right, and a row for each of the others."""
    all_of_them = tuple(verdicts)
    right = ", ".join(f"`{each.name}`" for each in all_of_them if each.outcome == "right")
    rows = (
        f"| `{each.name}` | {each.outcome} | {each.reason.replace('|', '/')} |"
        for each in all_of_them
        if each.outcome != "right"
    )
    return "\n".join((f"Right: {right}.", "", f"| {title} | outcome | why |", "| --- | --- | --- |", *rows))


def main() -> None:
    """Print what docs/generate.md says."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    pair = Pair()
    arguments = [pair.judge_argument(name) for name in argument_names()]
    names = [pair.judge_name(name) for name in cache_names()]
    print(as_text("argument", arguments), as_text("name", names), sep="\n\n")
    if any(verdict.outcome in ("failed", "not tried") for verdict in (*arguments, *names)):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

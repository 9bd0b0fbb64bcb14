"""Tasks put to a model whose cache kvpress compresses. Run in kvpress's environment.

Takes the path of a JSON file, see `xkv_fx.evaluation.quality.kvpress`, and prints a line of JSON for each job.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import kvpress
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

PRESSES: dict[str, Any] = {
    "snapkv": lambda ratio: kvpress.SnapKVPress(compression_ratio=ratio),
    "kvzip": lambda ratio: kvpress.KVzipPress(compression_ratio=ratio),
    "adakv": lambda ratio: kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(compression_ratio=ratio)),
}


def read(ids: Tensor, cache: DynamicCache, seen: int) -> Tensor:
    """Logits `[1, vocabulary]` after tokens `[1, S]`, of which `seen` came before."""
    positions = torch.arange(seen, seen + ids.shape[1])[None]
    logits: Tensor = model(ids, position_ids=positions, past_key_values=cache, logits_to_keep=1).logits
    return logits[:, -1]


def compressed(press: Any, ids: Tensor) -> tuple[DynamicCache, Tensor]:
    """A cache that holds what a press keeps of a prompt, and the logits after it."""
    cache = DynamicCache()
    if press is None:
        return cache, read(ids, cache, 0)
    with press(model):
        logits = read(ids, cache, 0)
    return cache, logits


def answered(press: Any, context: Tensor, question: Tensor, new_tokens: int, form: str) -> list[int]:
    """Greedy tokens; the question is part of what is compressed, or comes after it."""
    shown = context if form == "after" else torch.cat((context, question), 1)
    cache, logits = compressed(press, shown)
    seen, tokens = shown.shape[1], list[int]()
    if form == "after":
        logits, seen = read(question, cache, seen), seen + question.shape[1]
    while True:
        token = logits.argmax(-1, keepdim=True)
        if int(token) in request["ends"]:
            return tokens
        tokens.append(int(token))
        if len(tokens) == new_tokens:
            return tokens
        logits, seen = read(token, cache, seen), seen + 1


def forced(press: Any, context: Tensor, text: Tensor) -> Tensor:
    """Log-probabilities `[T, vocabulary]` before each token of a text that follows the context."""
    cache, logits = compressed(press, context)
    steps = [logits]
    for step, token in enumerate(text[:, :-1].split(1, 1)):
        steps.append(read(token, cache, context.shape[1] + step))
    return torch.log_softmax(torch.cat(steps).double(), -1)


def strayed(press: Any, context: Tensor, text: Tensor) -> dict[str, float]:
    """How far a text's distributions stray from those of the full cache."""
    full, ours = forced(None, context, text), forced(press, context, text)
    told = (full - ours).gather(1, text[0][:, None]).mean()
    return {
        "kl": float((full.exp() * (full - ours)).sum(-1).mean()),
        "nll_change": float(told),
        "agreement": float((full.argmax(-1) == ours.argmax(-1)).double().mean()),
    }


with open(sys.argv[1], encoding="utf-8") as file:
    request = json.load(file)
options: dict[str, Any] = {} if request["gguf"] is None else {"gguf_file": request["gguf"]}
dtype = getattr(torch, request["dtype"])
model = AutoModelForCausalLM.from_pretrained(request["folder"], dtype=dtype, local_files_only=True, **options).eval()
with torch.no_grad():
    for index, job in enumerate(request["jobs"]):
        answers: list[Any] = []
        for example in job["examples"]:
            made = PRESSES[job["press"]](1 - job["share"])
            context, question = (torch.tensor([example[part]]) for part in ("context", "question"))
            if job["form"] is None:
                answers.append(strayed(made, context, question))
            else:
                answers.append(answered(made, context, question, example["new_tokens"], job["form"]))
        print(json.dumps({"job": index, "answers": answers}), flush=True)

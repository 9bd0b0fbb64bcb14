"""From a limit to a running model: the best plan under a quarter of the full cache, and what the limit costs.

Run it with `python examples/fit.py`. The model is tiny and random, so it takes seconds and downloads nothing. For a
real one, replace `tiny_model()` by `AutoModelForCausalLM.from_pretrained(...)`, and the prompts by texts like those
that will be served (`tokenizer=` turns strings into tokens).
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import xkv_fx

PROMPTS, TOKENS, NEW = 6, 96, 12


def tiny_model() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 512}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, pad_token_id=0, eos_token_id=None)).eval()


def main() -> None:
    model = tiny_model()
    prompts = list(torch.randint(1, 100, (PROMPTS, TOKENS)))
    # Every other prompt is held out; its last tokens tell the plans apart.
    found = xkv_fx.fit(model, prompts, fraction="25%", max_new_tokens=NEW, continuation=NEW, multiple=1)
    print(found)
    llm = xkv_fx.transform(model, found.budgets, backend="eager", max_new_tokens=NEW)
    print(f"{llm.kv_bytes:,} bytes allocated of {found.report.limit:,}")
    output = llm.generate(prompts[1][None], attention_mask=torch.ones(1, TOKENS), max_new_tokens=NEW, do_sample=False)
    print("generated", output[0, TOKENS:].tolist())


if __name__ == "__main__":
    main()

"""A transformers model compiled by `torch.compile` for a KV cache of a planned size, with its own `generate`.

Run it with `python examples/torch_compile_backend.py`. The model is tiny and random, so it takes seconds and downloads
nothing. For a real one, replace `tiny_model()` by `AutoModelForCausalLM.from_pretrained(...)`.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import xkv_fx


def tiny_model() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            pad_token_id=0,
            eos_token_id=None,
        )
    ).eval()


def main() -> None:
    model = tiny_model()
    budgets = xkv_fx.Budgets((24, 12))  # or xkv_fx.solve(...), or the path of a plan
    model.set_attn_implementation("xkv")
    # Without "lower", decode is compiled by Inductor, as a model that does real work should be.
    model.compile(backend="xkv", options={"budgets": budgets, "lower": "eager"})

    options = {"max_new_tokens": 8, "do_sample": False}
    for length in (60, 33):
        prompt = torch.randint(1, 100, (1, length))
        cache = xkv_fx.Cache(model, budgets)
        text = model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, **options)
        print(f"{length} tokens of prompt, {cache.kv_bytes} bytes kept, then", text[0, length:].tolist())

    # The same cache goes on with the conversation, given the whole of it.
    text = torch.cat((text, torch.randint(1, 100, (1, 10))), 1)
    text = model.generate(text, attention_mask=torch.ones_like(text), past_key_values=cache, **options)
    print("and on, after another turn,", text[0, -8:].tolist())
    print(cache.describe())
    print("graphs compiled by Dynamo:", torch._dynamo.utils.counters["stats"]["unique_graphs"])


if __name__ == "__main__":
    main()

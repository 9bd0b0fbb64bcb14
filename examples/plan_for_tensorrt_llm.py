"""Sizes of each layer's cache for TensorRT-LLM, from a profile.

Run it with `python examples/plan_for_tensorrt_llm.py`. The model is tiny and random, so it takes seconds and downloads
nothing. TensorRT-LLM itself is not needed: what is written is the JSON of its `KvCacheConfig`'s arguments, as in
`LLM(..., kv_cache_config=KvCacheConfig(**settings))`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import xkv_fx


def main() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 512}
    heads = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    prompts = [torch.randint(1, 100, (1, 300)) for _ in range(2)]

    # Its cache keeps the newest tokens, and the first ones. The profile's curves are those of the policy below, which
    # also keeps what scores highest, so that the sizes carry over, and their quality does not.
    profile = xkv_fx.profile(model, prompts, policy=xkv_fx.Policy(sinks=4))
    budgets = xkv_fx.solve(profile, fraction=0.384)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kv_cache_config.json"
        settings = budgets.to("tensorrt-llm", path)
        assert json.loads(path.read_text()) == settings
    print(json.dumps(settings["settings"]))
    print(settings["note"])


if __name__ == "__main__":
    main()

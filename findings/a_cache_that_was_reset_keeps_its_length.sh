#!/bin/sh
# transformers 5.17.0: `DynamicCache.reset` sets keys and values to zero and keeps as many of them as there were.
#
# Input: a tiny Llama; a cache that held 10 tokens is reset, and the model is called with it and 10 other tokens.
# One would expect the logits of a fresh cache, as for a static cache that was reset, or an error.
# Seen: the cache still has a length of 10, positions go on from there, and attention gives its share to ten tokens of
# zeros; logits are other than those of a fresh cache, without an error. transformers 5.23 drops the tokens.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.17.0
cat > "$work/check.py" <<'END'
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, eos_token_id=None,
)
model = LlamaForCausalLM(config).eval()
before, ids = torch.arange(1, 11)[None], torch.arange(21, 31)[None]


def logits(cache):
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


def after_reset(cache):
    with torch.no_grad():
        model(before, past_key_values=cache)
    cache.reset()
    return int(cache.get_seq_length()), logits(cache)


fresh = logits(DynamicCache(config=config))
static_length, static = after_reset(StaticCache(config=config, max_cache_len=32))
length, dynamic = after_reset(DynamicCache(config=config))
assert static_length == 0 and torch.allclose(static, fresh, atol=1e-5)
print("static cache: length 0 after reset, logits of a fresh one")
assert length == 10, length
assert not torch.allclose(dynamic, fresh, atol=1e-2), "the logits are those of a fresh cache now"
print("dynamic cache: length 10 after reset, logits up to", round((dynamic - fresh).abs().max().item(), 3), "away")
END
"$work/env/bin/python" "$work/check.py"

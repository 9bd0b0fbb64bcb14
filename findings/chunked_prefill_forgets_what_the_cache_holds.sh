#!/bin/sh
# transformers 5.17.0: `generate` with `prefill_chunk_size` feeds the whole prompt to a cache that holds a part of it.
#
# Input: a tiny Llama; a DynamicCache that holds the first 6 of 10 tokens; then
# model.generate(ids, past_key_values=cache, max_new_tokens=1, prefill_chunk_size=4).
# One would expect 10 tokens in the cache afterwards, as without prefill_chunk_size.
# Seen: 16 tokens without an error; the 6 that were there, and all 10 behind them. 5.23.0 leaves 10.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.17.0
cat > "$work/check.py" <<'END'
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, eos_token_id=None,
)
model = LlamaForCausalLM(config).eval()
ids = torch.arange(1, 11)[None]

held = {}
for chunk in (None, 4):
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(ids[:, :6], past_key_values=cache)
    model.generate(ids, past_key_values=cache, max_new_tokens=1, do_sample=False, prefill_chunk_size=chunk)
    held[chunk] = cache.get_seq_length()
print("tokens held by prefill_chunk_size:", held)
assert held == {None: 10, 4: 16}, held
END
cd "$work"
TRANSFORMERS_VERBOSITY=error "$work/env/bin/python" -W ignore check.py

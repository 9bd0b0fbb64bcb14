#!/bin/sh
# transformers 5.24.0: `generate` with a cache that already holds the whole prompt feeds the whole prompt once more.
#
# Input: a tiny Llama; a DynamicCache filled by model(ids, past_key_values=cache) with all 10 tokens of the prompt;
# then model.generate(ids, past_key_values=cache, max_new_tokens=1). Seen with 5.17.0 and 5.23.0 too.
# One would expect the cache to be used as it is (its last token run again, or an error).
# Seen: no error; the cache holds 20 tokens afterwards, the prompt twice. The cause is a slice `ids[:, -n:]` with the
# number n of tokens that are not cached yet: for n = 0 it is everything.
# A cache that holds 9 of the 10 tokens ends with 10, as it should.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
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
for filled in (9, 10):
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(ids[:, :filled], past_key_values=cache)
    model.generate(ids, past_key_values=cache, max_new_tokens=1, do_sample=False)
    held[filled] = cache.get_seq_length()
print("tokens held before and after:", held)
assert held == {9: 10, 10: 20}, held
END
cd "$work"
TRANSFORMERS_VERBOSITY=error "$work/env/bin/python" -W ignore check.py

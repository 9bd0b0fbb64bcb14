#!/bin/sh
# transformers 5.24.0: a cache passed by its old name is dropped without an error where the new name is given as None.
#
# Input: a tiny Llama; model(ids, past_key_values=cache, cache=None), as a wrapper does that hands on every argument of
# `forward` by name, some of them None.
# One would expect None to mean "not given", as it does for each of the two names alone, or an error.
# Seen: logits as without any cache, the given cache stays empty, and a FutureWarning says only that the old name is
# deprecated.
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
for name, more in (("old name alone", {}), ("new name None beside it", {"cache": None})):
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(ids, past_key_values=cache, **more)
    held[name] = cache.get_seq_length()
print("tokens held:", held)
assert held == {"old name alone": 10, "new name None beside it": 0}, held
END
cd "$work"
TRANSFORMERS_VERBOSITY=error "$work/env/bin/python" -W ignore check.py

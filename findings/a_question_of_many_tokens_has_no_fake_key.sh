#!/bin/sh
# kvpress 0.5.5 (transformers 5.2.0): behind a context that AdaKVPress compressed, a question of many tokens raises.
#
# Input: a tiny random Llama, head size 16; a context of 200 tokens, of which AdaKVPress(SnapKVPress(0.5)) is to drop half;
# then a question, fed in one call with the cache, of 1 or of 64 tokens.
# One would expect both to work: which heads keep which tokens was settled by the context.
# Seen: 1 token works; 64 raise ValueError "Could not find fake keys such that for every query q, exp(<q, k>) = 0".
# Dropped tokens are not removed but given a key that no query of the call points towards, and where the queries of a
# long question lie on all sides there is none. Queries of trained models lie closer together.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.2.0 kvpress==0.5.5
cat > "$work/check.py" <<'END'
import torch
from kvpress import AdaKVPress, SnapKVPress
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, eos_token_id=None,
)
model = LlamaForCausalLM(config).eval()
context = torch.randint(1, 64, (1, 200))
seen = {}
for tokens in (1, 64):
    cache = DynamicCache()
    with torch.no_grad():
        with AdaKVPress(SnapKVPress(0.5))(model):
            model(context, past_key_values=cache)
        positions = torch.arange(200, 200 + tokens)[None]
        try:
            model(torch.randint(1, 64, (1, tokens)), past_key_values=cache, position_ids=positions)
            seen[tokens] = "works"
        except ValueError as error:
            seen[tokens] = str(error).split(" such that")[0]
print("a question of so many tokens:", seen)
assert seen == {1: "works", 64: "Could not find fake keys"}, seen
END
cd "$work"
TRANSFORMERS_VERBOSITY=error "$work/env/bin/python" -W ignore check.py

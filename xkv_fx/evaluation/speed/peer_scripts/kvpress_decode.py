"""SnapKV by kvpress around a transformers model: prefill compresses, decode appends. Run in kvpress's environment."""

import json
import sys
import time

import torch
from kvpress import SnapKVPress
from transformers import AutoModelForCausalLM, DynamicCache

request = json.loads(sys.argv[1])
options = {} if request["gguf"] is None else {"gguf_file": request["gguf"]}
dtype = getattr(torch, request["dtype"])
model = AutoModelForCausalLM.from_pretrained(request["folder"], dtype=dtype, local_files_only=True, **options).eval()
torch.manual_seed(0)
ids = torch.randint(model.config.vocab_size, (request["rows"], request["context"]))
press = SnapKVPress(compression_ratio=1 - request["kept"] / request["context"])
cache = DynamicCache()
steps = []
with torch.no_grad():
    started = time.perf_counter()
    with press(model):
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
    prefill = time.perf_counter() - started
    for step in range(request["new_tokens"] + 2):
        started = time.perf_counter()
        position = torch.full((request["rows"], 1), request["context"] + step)
        logits = model(logits.argmax(-1), position_ids=position, past_key_values=cache).logits
        steps.append(time.perf_counter() - started)
held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))  # type: ignore
print(json.dumps({"rows": request["rows"], "prefill_s": prefill, "steps_s": steps[2:], "kv_bytes": held}))

"""Summaries of a batch of long texts under a limit in bytes: measure, solve for the bytes, check, generate.

Run it with `python examples/summarise_batch.py`. The model is tiny and random, so it takes seconds and downloads
nothing; its summaries are nonsense. For a real one, replace `tiny_model()` and `texts()`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import xkv_fx

BATCH, NEW_TOKENS = 4, 12
LIMIT = 120_000
"""Bytes that the K/V buffers of the whole batch may take, generated tokens included."""


def tiny_model() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 512}
    heads = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, pad_token_id=0, eos_token_id=None)).eval()


def texts(count: int) -> list[Tensor]:
    """Token ids `[1, length]`, each of another length; the instruction stands at the end, where scorers look."""
    return [torch.randint(1, 100, (1, int(length))) for length in torch.randint(120, 200, (count,))]


def main() -> None:
    model = tiny_model()
    policy = xkv_fx.Policy(eviction="append")  # nothing of a summary is dropped; its tokens come on top
    calibration = xkv_fx.calibrate(model, texts(3), policy=policy, continuation=NEW_TOKENS)
    slot = sum(spec.slot_bytes() for spec in calibration.layers) * BATCH
    budgets = xkv_fx.solve(calibration, kv_bytes=LIMIT - NEW_TOKENS * slot, batch_size=BATCH)
    wanted = budgets.kv_bytes(model, batch_size=BATCH, max_new_tokens=NEW_TOKENS)
    print(f"capacities {budgets.capacities}: {wanted} of {LIMIT} bytes")
    print("held out:", xkv_fx.verify(model, budgets, texts(3), continuation=NEW_TOKENS))

    llm = xkv_fx.transform(model, budgets, batch_size=BATCH, backend="eager", max_new_tokens=NEW_TOKENS)
    rows = texts(BATCH)
    longest = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows])  # padded on the left
    output = llm.generate(input_ids=ids, attention_mask=(ids != 0).long(), max_new_tokens=NEW_TOKENS, do_sample=False)
    assert llm.kv_bytes == wanted <= LIMIT
    for row, summary in zip(rows, output[:, longest:].tolist(), strict=True):
        print(f"{row.shape[1]} tokens -> {summary}")


if __name__ == "__main__":
    main()

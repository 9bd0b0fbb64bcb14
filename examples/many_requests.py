"""Many requests of different lengths through a batch of four rows, each of which is at a request of its own.

Run it with `python examples/many_requests.py`. The model is tiny and random, so it takes seconds and downloads nothing;
its answers are nonsense. For a real one, replace `tiny_model()` by `AutoModelForCausalLM.from_pretrained(...)`, and
give strings and `tokenizer=` in place of token ids.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import xkv_fx

ROWS = 4
REQUESTS = 12


def tiny_model() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 512}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, pad_token_id=0, eos_token_id=None)).eval()


def main() -> None:
    llm = xkv_fx.transform(tiny_model(), xkv_fx.Budgets((48, 32)), batch_size=ROWS, backend="eager")
    system = torch.randint(1, 100, (20,))  # what all prompts begin with; it is fed once
    requests = []
    for index in range(REQUESTS):
        prompt = torch.cat((system, torch.randint(1, 100, (10 + 15 * index,))))
        requests.append(xkv_fx.Request(prompt, max_new_tokens=5 + 7 * (index % 4)))
    requests.append(xkv_fx.Request([1] * 600))  # fails, and the others do not notice
    for answer in llm.generate_many(requests, prefix=system, in_order=False):
        if answer.error is not None:
            print(f"request {answer.index:2}: {answer.error}")
        else:
            print(
                f"request {answer.index:2}: {answer.prompt_tokens:3} tokens of prompt, {answer.shared_tokens:2} of "
                f"them not fed again, {len(answer.ids):2} tokens of answer"
            )
    beside = 2 * llm.kv_bytes // ROWS  # one row for the next prompt, and one for what the prefix left
    print(f"{llm.kv_bytes} bytes of K/V for the batch, and {beside} beside it")


if __name__ == "__main__":
    main()

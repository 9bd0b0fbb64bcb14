"""A chat that goes on and on in the memory of its first minute.

Run it with `python examples/chat_session.py`. The model is tiny and random, so it takes seconds and downloads nothing;
its answers are nonsense. For a real one, replace `tiny_model()` by `AutoModelForCausalLM.from_pretrained(...)`.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import xkv_fx

TURNS = 12


def tiny_model() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 1024}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, pad_token_id=0, eos_token_id=None)).eval()


def main() -> None:
    model = tiny_model()
    # A ring overwrites the oldest of the newest tokens while it decodes; each turn chooses the survivors again. The
    # first four tokens stay, whatever happens.
    budgets = xkv_fx.Budgets((48, 32), xkv_fx.Policy(eviction="ring", sinks=4))
    llm = xkv_fx.transform(model, budgets, backend="eager")
    session = llm.new_session()
    conversation = torch.empty(1, 0, dtype=torch.int64)
    for turn in range(TURNS):
        said = torch.randint(1, 100, (1, 20))  # tokenizer.apply_chat_template(...) of the whole conversation
        conversation = torch.cat((conversation, said), 1)
        conversation = llm.generate(
            input_ids=conversation,
            attention_mask=torch.ones_like(conversation),
            past_key_values=session,
            max_new_tokens=15,
            do_sample=False,
        )
        if turn % 4 == 3:
            kept = session.kept_positions(1)[0, 0]
            print(
                f"turn {turn + 1:2}: {conversation.shape[1]} tokens so far, {session.kv_bytes} bytes of K/V; layer 1 "
                f"keeps {int((kept >= 0).sum())} of them, the oldest {kept.sort().values[:5].tolist()}"
            )

    # What was said so far can be kept in a file, or go on in two ways.
    other_way = session.fork()
    assert session.kv_bytes == other_way.kv_bytes == budgets.kv_bytes(model)
    print(f"bytes of a full cache by now: {xkv_fx.Budgets.full(2, conversation.shape[1]).kv_bytes(model)}")


if __name__ == "__main__":
    main()

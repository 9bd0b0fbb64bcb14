"""A scorer of your own: registered in ten lines, named by a policy, compiled into a model like those that come along.

Run it with `python examples/own_scorer.py`. The model is tiny and random, so it takes seconds and downloads nothing.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import xkv_fx
from xkv_fx.runtime.scorers import PromptView, register_scorer


@register_scorer("peak")
@dataclasses.dataclass(frozen=True)
class Peak:
    queries: int = 16
    paper: ClassVar[str] = "none; an example"
    looks_at_question: ClassVar[bool] = True
    reads_values: ClassVar[bool] = False
    measures_attention: ClassVar[bool] = False  # a maximum is no share of the attention mass

    def __call__(self, prompt: PromptView) -> torch.Tensor:
        """The most attention that any one of the newest queries pays to a token, over the heads that share its key."""
        return prompt.attention_of_last(self.queries).amax((2, 3))


def main() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            pad_token_id=0,
            eos_token_id=None,
        )
    ).eval()
    prompt = torch.randint(1, 100, (1, 60))

    budgets = xkv_fx.Budgets((24, 12), xkv_fx.Policy("peak", {"queries": 8}))
    llm = xkv_fx.transform(model, budgets, backend="eager")
    output = llm.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)

    print(llm.describe())
    print(f"kept {budgets.capacities} of {prompt.shape[1]} prompt tokens, a layer and KV head: {llm.kv_bytes} bytes")
    print("generated", output[0, prompt.shape[1] :].tolist())


if __name__ == "__main__":
    main()

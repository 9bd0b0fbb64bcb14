"""A Llama that decodes one token after another over slots that give back what their formats keep."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from oracles.attention_loops import attend
from oracles.scores import snapkv_scores_reference
from oracles.selection import keep
from oracles.slots import reference_slot
from xkv_fx.planning.measure.held import Storing
from xkv_fx.policy import EVICTIONS
from xkv_fx.runtime.quantize import Coding
from xkv_fx.runtime.slots import EMPTY, SlotPlan


class Slots:
    """What one layer holds: `k`, `v` `[1, kv_heads, slots, dim]`, and for each head the ordinals in them."""

    def __init__(self, plan: SlotPlan | None, storing: Storing | None, q: Tensor, k: Tensor, v: Tensor) -> None:
        """As a prefill with these queries, keys and values leaves it."""
        storing, tokens = Storing(("model", "model")) if storing is None else storing, k.shape[2]
        self.formats, mean = storing.formats, storing.mean_key
        self.mean = torch.zeros(()) if mean is None else torch.tensor(mean.values)[:, None]
        room = tokens + 64
        self.plan = SlotPlan(room, room, tokens, 0, "append") if plan is None else plan
        self.k, self.v = (part.new_zeros((*part.shape[:2], self.plan.slots, part.shape[3])) for part in (k, v))
        positions = torch.zeros(self.k.shape[:3], dtype=torch.int32)
        length, none = torch.tensor([tokens]), torch.tensor([0])
        scores = snapkv_scores_reference(q, k, length, q.shape[-1] ** -0.5).float()
        keep(
            k, v, scores, length, none, none, self.k, self.v, positions, self.plan.capacity, self.plan.recent,
            self.plan.sinks, EVICTIONS.index(self.plan.eviction), None, True,
        )  # fmt: skip
        held = min(tokens, self.plan.capacity)
        self.ordinals = [[*head[:held], *[EMPTY] * (self.plan.slots - held)] for head in positions[0].tolist()]
        self.k, self.v = self.stored(self.k, self.v)

    def stored(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as they come back from the slots."""
        codings = (None if name == "model" else Coding.of(name, k.shape[-1]) for name in self.formats)
        keys, values = (
            part if coding is None else coding.passed(part - mean) + mean
            for coding, part, mean in zip(codings, (k, v), (self.mean, 0.0), strict=True)
        )
        return keys, values

    def write(self, ordinal: int, k: Tensor, v: Tensor) -> None:
        """Keep a decoded token, `[1, kv_heads, 1, dim]`."""
        k, v = self.stored(k, v)
        for head, held in enumerate(self.ordinals):
            slot = reference_slot(held, self.plan)
            held[slot] = ordinal
            self.k[0, head, slot], self.v[0, head, slot] = k[0, head, 0], v[0, head, 0]

    def reach(self, row: int, head: int, query: int) -> list[int]:
        return [slot for slot, ordinal in enumerate(self.ordinals[head]) if ordinal != EMPTY]


@torch.no_grad()
def continue_over_slots(
    model: LlamaForCausalLM,
    ids: Tensor,
    new: int,
    plans: Sequence[tuple[SlotPlan | None, Storing | None]],
) -> Tensor:
    """Logits of the last `new` of the tokens `[1, S + new]`, decoded one by one: `[new, vocabulary]`.

    The prompt is attended to as it is; what each layer's slots keep of it, and every decoded token, pass through the
    layer's formats.
    """
    prompt = ids.shape[1] - new
    caches: list[Slots] = []

    def attended(layer: int, q: Tensor, k: Tensor, v: Tensor, position: int) -> Tensor:
        scale = q.shape[-1] ** -0.5
        if position == 0:
            caches.append(Slots(*plans[layer], q, k, v))
            return attend(q, k, v, lambda row, head, query: list(range(query + 1)), scale)[0]
        caches[layer].write(position, k, v)
        return attend(q, caches[layer].k, caches[layer].v, caches[layer].reach, scale)[0]

    def run(tokens: Tensor, position: int) -> Tensor:
        x = model.model.embed_tokens(tokens)
        cos, sin = model.model.rotary_emb(x, position + torch.arange(tokens.shape[1])[None])
        for index, layer in enumerate(model.model.layers):
            normed, attention = layer.input_layernorm(x), layer.self_attn
            q, k, v = (
                project(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            out = attended(index, *apply_rotary_pos_emb(q, k, cos, sin), v, position)
            x = x + attention.o_proj(out.to(x.dtype).transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        logits: Tensor = model.lm_head(model.model.norm(x))
        return logits[0, -1]

    run(ids[:, :prompt], 0)
    return torch.stack([run(ids[:, at : at + 1], at) for at in range(prompt, ids.shape[1])])

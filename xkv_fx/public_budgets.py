"""The plan as users hold it: it counts the bytes of a transformers model, too.

`Plan` is at the bottom of the package and knows no model library. This class sits above the part that reads models, so
that nothing has to import upwards.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from xkv_fx.budgets import Plan
from xkv_fx.layers import HasItemSize, given_layers


@dataclasses.dataclass(frozen=True, eq=False)  # equal and hashed as every plan is
class Budgets(Plan):
    """KV cache capacities of layers or of their KV heads, and the policy that they are valid for.

    Attributes:
        capacities: K/V slots of each layer that owns a cache, in execution order, *per KV head and row*; recent
            tokens are part of it. A tuple in the place of a number has one number for each KV head of the layer.
        policy: how those slots are filled.
        provenance: how the plan was made.
        formats: how each layer stores its slots: a pair of names (`"model"`, `"fp8"`, `"int8"`, `"int4"`), of its keys
            and of its values, or None for the model's dtype, or a tuple of these, one for each KV head; None as a whole
            if everything is in the model's dtype. Latents are keys and values at once, and have one format for both.
        mean_keys: what is subtracted from each layer's keys before they are stored in fewer bits, as `calibrate`
            measured it: a `MeanKey` (its `values` are float32 `[kv_heads, key_dim]`), or None for nothing. None as a
            whole if nothing is subtracted anywhere, or no layer stores its keys in fewer bits.

    Raises:
        BudgetError: no layers, a capacity that is not a whole number of at least 1, or formats or mean keys that are
            unknown or not one for each capacity.
    """

    def kv_bytes(
        self, model: Any, batch_size: int = 1, dtype: HasItemSize | None = None, max_new_tokens: int = 0
    ) -> int:
        """Bytes that the K/V buffers of `batch_size` rows take.

        Args:
            model: a transformers causal language model, a transformed one, or its `LayerSpec`s.
            batch_size: rows after expansion: batch x beams or return sequences.
            dtype: the dtype of whatever has no format of its own; the model's by default.
            max_new_tokens: room set aside for generated tokens; counts under `eviction="append"` only.

        Raises:
            BudgetError: another number of layers, formats that a layer cannot be stored in, or a count that is not a
                whole number in its range.
            UnsupportedModelError: the model has no KV cache that can be planned.
        """
        layers = given_layers(model)
        if layers is None:
            from xkv_fx.hf.capture import layers_of_model  # loads transformers

            layers = layers_of_model(model)
        return super().kv_bytes(layers, batch_size, dtype, max_new_tokens)


def budgets_of(plan: Plan) -> Budgets:
    """The same plan as the class that users hold; a plan that already is one is returned as it is."""
    if isinstance(plan, Budgets):
        return plan
    return Budgets(**{field.name: getattr(plan, field.name) for field in dataclasses.fields(Plan)})

"""Decode attention of a layer whose KV heads have several caches, in one call on CPU."""

from __future__ import annotations

import torch

from xkv_fx.runtime.attention import empty_output
from xkv_fx.runtime.kernels.build_cpu import TAGS, library

library.define(
    "decode_heads_cpu(Tensor q, Tensor k, Tensor v, Tensor(a!)[] buffers, Tensor[] slots, Tensor[] masks, "
    "int[] places, int[] bits, float scale, float? softcap, Tensor? sink_logits, Tensor[] key_means) -> Tensor",
    tags=TAGS,
)
"""As `decode_attention_cpu` and `decode_coded_cpu`, whose kernels must have been built, for all caches of a layer.

    q, k, v: of all heads of the layer, `[rows, heads, 1, size]`.
    buffers: of one cache after the other, keys and values, each followed by its scales where `bits` are not both 0.
    slots, masks: of each cache.
    places: of one cache after the other, which of the layer's KV heads it is for; each head has one cache.
    bits: of the keys and of the values of each cache, 0 for the dtype.
    sink_logits: of all query heads of the layer, float32.
    key_means: of each cache with bits, float32; or none at all.
"""


torch.library.register_fake("xkv::decode_heads_cpu", empty_output, lib=library)

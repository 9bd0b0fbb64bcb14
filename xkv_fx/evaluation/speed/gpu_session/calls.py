"""Decode attention over buffers full of random numbers, by our kernels and by plain torch."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from xkv_fx.formats import SlotFormat
from xkv_fx.runtime import coded_ops, ops  # noqa: F401  (register the ops)
from xkv_fx.runtime.kernels.decode_triton import plan_launch
from xkv_fx.runtime.quantize import Coding

PROCESSORS = 16  # of a GPU that is not there
Heads = tuple[int, int, int]
"""Query heads, KV heads, and the head size."""


@dataclasses.dataclass(frozen=True)
class DecodeCall:
    """One token a row, and the slots of one layer.

    Attributes:
        q, k, v: of the token.
        buffers: keys and values; with formats also their scales, in the order in which ops take them.
        bits: of keys and of values; None in the model's dtype.
        slot, mask: which slot the token takes, and what it sees.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    buffers: tuple[Tensor, ...]
    bits: tuple[int, int] | None
    slot: Tensor
    mask: Tensor

    @classmethod
    def random(
        cls, heads: Heads, rows: int, slots: int, dtype: torch.dtype, name: SlotFormat, device: torch.device
    ) -> DecodeCall:
        """With keys and values in one format; every slot is seen, and the last one written."""
        queries, kv_heads, dim = heads
        q, k, v = (torch.randn(rows, count, 1, dim, device=device).to(dtype) for count in (queries, kv_heads, kv_heads))
        slot = torch.full((rows,), slots - 1, device=device)
        mask = torch.zeros(rows, 1, 1, slots, dtype=dtype, device=device)
        shape = (rows, kv_heads, slots)
        if name == "model":
            kv = tuple(torch.randn(*shape, dim, device=device, dtype=dtype) for _ in "kv")
            return cls(q, k, v, kv, None, slot, mask)
        coding = Coding.of(name, dim)
        parts: list[Tensor] = []
        for _ in "kv":
            codes = torch.randint(0, 127, (*shape, coding.code_bytes), dtype=torch.uint8, device=device)
            scales = torch.rand(*shape, coding.groups, coding.numbers, device=device).half() / 64
            parts += [codes, scales]
        return cls(q, k, v, tuple(parts), (coding.bits, coding.bits), slot, mask)

    @property
    def bytes_read(self) -> int:
        """Of the buffers."""
        return sum(part.nbytes for part in self.buffers)

    def copied(self, dtype: torch.dtype | None = None) -> DecodeCall:
        """With buffers of its own; numbers that are not codes in another dtype, if one is given."""

        def turned(part: Tensor) -> Tensor:
            return part.clone() if dtype is None or part.dtype != self.q.dtype else part.to(dtype, copy=True)

        coded = self.bits is not None
        buffers = tuple(part.clone() if coded else turned(part) for part in self.buffers)
        q, k, v, mask = map(turned, (self.q, self.k, self.v, self.mask))
        return DecodeCall(q, k, v, buffers, self.bits, self.slot, mask)

    def by_torch(self) -> Tensor:
        """The output by the op's own form in plain torch."""
        scale = self.q.shape[3] ** -0.5
        given = (self.q, self.k, self.v, *self.buffers, self.slot, self.mask, scale)
        if self.bits is None:
            plain: Tensor = torch.ops.xkv.decode_attention(*given)
            return plain
        coded: Tensor = torch.ops.xkv.decode_coded(*given, *self.bits)
        return coded

    def by_kernel(self) -> Tensor:
        """The output by our Triton kernel."""
        from xkv_fx.runtime.kernels import decode_coded_triton  # noqa: F401  (registers its op)

        rows, kv_heads, slots = self.buffers[0].shape[:3]
        dim, device = self.q.shape[3], self.q.device
        count = torch.full((rows,), slots, device=device)
        given = (self.q, self.k, self.v, *self.buffers, self.slot, self.mask, count, dim**-0.5)
        processors = PROCESSORS
        if device.type == "cuda":
            processors = torch.cuda.get_device_properties(device).multi_processor_count
        launch: dict[str, Any] = dataclasses.asdict(
            plan_launch(rows, kv_heads, slots, dim, dim, self.q.dtype, processors)
        )
        if self.bits is None:
            plain: Tensor = torch.ops.xkv.decode_attention_triton(*given, None, None, **launch)
            return plain
        coded: Tensor = torch.ops.xkv.decode_coded_triton(*given, *self.bits, None, None, None, **launch)
        return coded

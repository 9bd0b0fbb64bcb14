"""Keys and values in fewer bits. A slot is stored by itself: its codes and scales depend on no other slot.

A vector of a head is rotated, split into groups, and each group stored as whole numbers with a scale and a zero of its
own (asymmetric): `x ~ zero + scale * code`. In `"fp8"` it is stored as floats of 4 bits of exponent and 3 of mantissa
(E4M3, arXiv 2209.05433) with one scale: `x ~ scale * code`. The rotation is a fixed Hadamard matrix, which spreads an
outlier over all elements of a vector; queries are rotated too, so that products stay what they were, and outputs are
rotated back.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from xkv_fx.errors import BudgetError
from xkv_fx.formats import CODE_BITS, group_of
from xkv_fx.mean_keys import MeanKey

_LARGEST = torch.finfo(torch.float16).max
_FLOAT8 = torch.float8_e4m3fn
_LARGEST_FLOAT8 = torch.finfo(_FLOAT8).max


@dataclasses.dataclass(frozen=True)
class Coding:
    """How vectors of one size are stored in fewer bits.

    Attributes:
        bits: of an element, 8 or 4.
        dim: elements of a vector.
        group: elements that share a scale, and a zero unless they are floats.
        floats: codes are floats of 8 bits instead of whole numbers.
    """

    bits: int
    dim: int
    group: int
    floats: bool = False

    @classmethod
    def of(cls, name: str, dim: int) -> Coding:
        """The coding that a format's name stands for.

        Raises:
            BudgetError: a format that stores no codes, or a size that no group divides.
        """
        if name not in CODE_BITS:
            raise BudgetError(f"the format {name!r} stores no codes; those that do are {', '.join(CODE_BITS)}")
        return cls.of_bits(CODE_BITS[name], dim, floats=name == "fp8")

    @classmethod
    def of_bits(cls, bits: int, dim: int, floats: bool = False) -> Coding:
        """The coding of so many bits an element.

        Raises:
            BudgetError: as `of`.
        """
        return cls(bits, dim, dim if floats else group_of(dim), floats)

    @property
    def groups(self) -> int:
        """Groups of a vector."""
        return self.dim // self.group

    @property
    def numbers(self) -> int:
        """Numbers beside the codes of a group: its scale, and its zero unless they are floats."""
        return 1 if self.floats else 2

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of a vector."""
        return self.dim * self.bits // 8

    @property
    def nbytes(self) -> int:
        """Bytes of a vector, its scales and zeros included."""
        return self.code_bytes + self.groups * self.numbers * torch.float16.itemsize

    def encode(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Codes uint8 `[..., code_bytes]`, and scales with zeros float16 `[..., groups, 2]`, of vectors `[..., dim]`;
        the bits of floats and their scales `[..., 1, 1]`.

        With 4 bits, a byte holds two elements: the first half of the vector in the low bits, the second in the high.
        """
        grouped = rotate(vectors.float()).unflatten(-1, (self.groups, self.group))
        if self.floats:
            scale = (grouped.abs().amax(-1) / _LARGEST_FLOAT8).clamp(max=_LARGEST).half()
            small = (grouped / _divisor(scale)).clamp(-_LARGEST_FLOAT8, _LARGEST_FLOAT8).to(_FLOAT8)
            return small.view(torch.uint8).flatten(-2), scale[..., None]
        low, high = grouped.aminmax(dim=-1)
        steps = 2**self.bits - 1
        zero = low.clamp(-_LARGEST, _LARGEST).half()
        scale = ((high - zero.float()) / steps).clamp(0, _LARGEST).half()
        codes = ((grouped - zero.float()[..., None]) / _divisor(scale)).round().clamp(0, steps)
        codes = codes.to(torch.uint8).flatten(-2)
        if self.bits == 4:
            first, second = codes.chunk(2, -1)
            codes = first | (second << 4)
        return codes, torch.stack((scale, zero), -1)

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """What was stored, still rotated: float32 `[..., dim]`."""
        if self.floats:
            return codes.view(_FLOAT8).float() * scales[..., 0].float()
        if self.bits == 4:
            codes = torch.cat((codes & 15, codes >> 4), -1)
        grouped = codes.unflatten(-1, (self.groups, self.group)).float()
        vectors: Tensor = (scales[..., 1:].float() + scales[..., :1].float() * grouped).flatten(-2)
        return vectors

    def passed(self, vectors: Tensor) -> Tensor:
        """Vectors `[..., dim]` as they come out of this coding, rotated back and in their own dtype."""
        return rotate_back(self.decode(*self.encode(vectors))).to(vectors.dtype)


def _divisor(scale: Tensor) -> Tensor:
    """Scales `[..., groups]` to divide by, float32 `[..., groups, 1]`: 1 where all of a group is alike."""
    return torch.where(scale > 0, scale, 1.0).float()[..., None]


def mean_tensor(mean: MeanKey, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A mean key as ops take it, float32 `[kv_heads, key_dim]`: rounded to the dtype of the keys, in which it is taken
    off, so that it is just what queries are multiplied by."""
    return torch.tensor(mean.values).to(device, dtype).float()


def rotate(vectors: Tensor) -> Tensor:
    """Vectors `[..., dim]` multiplied by a Hadamard matrix (Sylvester's, orthogonal), in their dtype. Products of two
    rotated vectors are those of the vectors.

    Where the size is no power of two, each block is rotated by itself, as long as the largest power of two that divides
    it. The matrix is symmetric, and so its own inverse.
    """
    dim = vectors.shape[-1]
    block = dim & -dim
    step = 1
    blocks = vectors.unflatten(-1, (dim // block, block))
    while step < block:
        first, second = blocks.unflatten(-1, (block // (2 * step), 2, step)).unbind(-2)
        blocks = torch.stack((first + second, first - second), -2).flatten(-3)
        step *= 2
    rotated: Tensor = (blocks / math.sqrt(block)).flatten(-2)
    return rotated


def rotate_back(vectors: Tensor) -> Tensor:
    """The inverse of `rotate`."""
    return rotate(vectors)

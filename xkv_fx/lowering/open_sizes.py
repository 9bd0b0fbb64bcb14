"""Sizes that are left open in a region of a graph, since its calls differ in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv


class OpenSizes:
    """The sizes in which the calls of a region differ, as symbols, and what they are in each call. Sizes that are equal
    in every call share a symbol."""

    def __init__(self) -> None:
        self._mode = FakeTensorMode(shape_env=ShapeEnv())
        self._opened_as: dict[tuple[int, ...], torch.SymInt] = {}
        self._symbols: dict[Any, tuple[int, ...]] = {}

    def opened(self, values: Sequence[Tensor]) -> Tensor:
        """A fake tensor that stands for the same input of all calls, of which `values` has one each."""
        shape = [self._opened(each) for each in zip(*(value.shape for value in values), strict=True)]
        first = values[0]
        with self._mode:
            if all(value.is_contiguous() for value in values):
                return torch.empty(shape, dtype=first.dtype, device=first.device)
            strides = [self._opened(each) for each in zip(*(value.stride() for value in values), strict=True)]
            return torch.empty_strided(shape, strides, dtype=first.dtype, device=first.device)

    def _opened(self, sizes: tuple[int, ...]) -> int | torch.SymInt:
        if len(set(sizes)) == 1:
            return sizes[0]
        if sizes not in self._opened_as:
            env: Any = self._mode.shape_env
            source = ConstantSource(f"size_{len(self._symbols)}")
            symbol = env.create_symbol(sizes[0], source, DimDynamic.DYNAMIC, None)
            self._symbols[symbol] = sizes
            self._opened_as[sizes] = env.create_symintnode(symbol, hint=sizes[0], source=source)
        return self._opened_as[sizes]

    def fit(self, call: int) -> bool:
        """Whether all that was decided by these sizes, while code was made from them, is right for a call. It is for
        the first one, by whose sizes it was decided."""
        env: Any = self._mode.shape_env
        known = {symbol: sizes[call] for symbol, sizes in self._symbols.items()}
        return all(guard.expr.subs(known) == sympy.true for guard in env.guards)

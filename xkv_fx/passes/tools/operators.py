"""Groups of aten operators, by what they do with the values that they are given."""

from __future__ import annotations

import operator

import torch

aten = torch.ops.aten
# These change the dtype alone.
CASTS = (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default)
# These put the elements of what they are given in other places.
MOVES = (
    *CASTS,
    aten.alias.default,
    aten.cat.default,
    aten.chunk.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.expand.default,
    aten.flatten.using_ints,
    aten.flip.default,
    aten.movedim.int,
    aten.narrow.default,
    aten.permute.default,
    aten.reshape.default,
    aten.reshape_as.default,
    aten.roll.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.stack.default,
    aten.transpose.int,
    aten.unbind.int,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.view.default,
    aten.view_as.default,
    aten.view_as_complex.default,
    aten.view_as_real.default,
    operator.getitem,
)

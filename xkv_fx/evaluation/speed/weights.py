"""The weights of a model: their bytes, and a copy of them in int8."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that a decode step reads: all but an embedding table that is not the output layer too."""
    unique = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    embedding: Any = model.get_input_embeddings()
    output: Any = model.get_output_embeddings()
    if embedding is not None and (output is None or output.weight is not embedding.weight):
        unique.pop(id(embedding.weight), None)
    return sum(_stored(tensor) for tensor in unique.values())


def with_int8_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose linear layers hold int8 numbers and one scale for each output channel, as torchao makes them.

    An embedding table stays as it is, also where it was the output layer too, which then has a copy of its own.
    """
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    int8_model = copy.deepcopy(model)
    quantize_(int8_model, Int8WeightOnlyConfig())
    return int8_model


def _stored(tensor: Tensor) -> int:
    """Bytes of a tensor, or of those that a quantized one is made of, whose own dtype is that of its results."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return tensor.nbytes
    return sum(_stored(getattr(tensor, name)) for name in flatten()[0])

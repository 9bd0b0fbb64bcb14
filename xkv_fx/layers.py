"""The layers of a model that own a KV cache: the shape of what each caches.

Like the plan, this needs neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from xkv_fx.errors import BudgetError
from xkv_fx.fields import Fields, check_fields, or_null, whole
from xkv_fx.formats import LayerFormats, check_latent, vector_bytes


class HasItemSize(Protocol):
    """A dtype: anything with its size in bytes, such as `torch.float16`."""

    @property
    def itemsize(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """The shape of what one layer caches, as found in the captured graph.

    Attributes:
        query_heads: attention heads of the queries.
        kv_heads: heads of the cached keys and values (fewer than `query_heads` under GQA).
        key_dim, value_dim: head sizes of keys and values. With a `value_dim` of 0 the values are the keys themselves,
            stored once (multi-head latent attention: the latent, and its rotary key).
        itemsize: bytes of one cached element in the model's own dtype.
        sliding_window: the number of newest tokens that the layer attends to, or None for all of them.
        index_dim: size of the key by which an indexer picks what a query attends to, kept beside the keys of each KV
            head; 0 for a layer that attends to all that it keeps.
    """

    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    itemsize: int
    sliding_window: int | None = None
    index_dim: int = dataclasses.field(default=0, repr=False)  # keys of saved sessions are made of what is printed

    def slot_bytes(self, dtype: HasItemSize | None = None, formats: LayerFormats | None = None) -> int:
        """Bytes that one slot takes over all KV heads, keys and values together, for one row.

        Args:
            dtype: the dtype that the format `"model"` stands for; the model's own by default.
            formats: of keys and values, None for that dtype. Codes, scales and zeros are counted.

        Raises:
            BudgetError: such a slot cannot be stored in these formats.
        """
        itemsize = self.itemsize if dtype is None else dtype.itemsize
        if formats is None:
            return self.kv_heads * (self.key_dim + self.value_dim + self.index_dim) * itemsize
        self.check_formats()
        keys, values = formats
        if self.value_dim == 0:
            check_latent(formats)
            return self.kv_heads * vector_bytes(keys, self.key_dim, itemsize)
        return self.kv_heads * (
            vector_bytes(keys, self.key_dim, itemsize) + vector_bytes(values, self.value_dim, itemsize)
        )

    def check_formats(self) -> None:
        """Raise BudgetError unless slots may be stored in fewer bits."""
        if self.index_dim:
            raise BudgetError(
                "it keeps the keys of an indexer, and layers that do are stored in the model's dtype alone; leave out "
                "their formats"
            )

    def effective_capacity(self, capacity: int) -> int:
        """`capacity`, clamped to the sliding window: older tokens are never attended to."""
        return capacity if self.sliding_window is None else min(capacity, self.sliding_window)


def with_itemsize(layers: Sequence[LayerSpec], itemsize: int | None) -> tuple[LayerSpec, ...]:
    """The layers as if the model ran in a dtype of so many bytes an element, so that bytes are counted as there; as
    they are where that is None."""
    return tuple(spec if itemsize is None else dataclasses.replace(spec, itemsize=itemsize) for spec in layers)


class HasLayers(Protocol):
    """An object that has its layers, such as a transformed model."""

    @property
    def layers(self) -> tuple[LayerSpec, ...]: ...


Layers = Sequence[LayerSpec] | HasLayers


_FIELDS: Fields = {
    "query_heads": whole(1),
    "kv_heads": whole(1),
    "key_dim": whole(1),
    "value_dim": whole(0),
    "itemsize": whole(1),
    "sliding_window": or_null(whole(1)),
    "index_dim": whole(1),
}
_OPTIONAL = ("index_dim",)
"""Left out where it is 0, so that older versions read what they know of."""


def layer_specs(layers: list[Any]) -> tuple[LayerSpec, ...]:
    """LayerSpecs from JSON objects, every number whole and at least 1, `value_dim` at least 0.

    An `index_dim` may be left out.

    Raises:
        FileFormatError: they are not; the message does not name the file.
    """
    each = enumerate(layers)
    return tuple(LayerSpec(**check_fields(fields, _FIELDS, f"layer {layer}", _OPTIONAL)) for layer, fields in each)


def layer_fields(layers: Sequence[LayerSpec]) -> list[dict[str, Any]]:
    """The JSON objects that `layer_specs` reads."""
    each = (dataclasses.asdict(spec) for spec in layers)
    return [{name: value for name, value in fields.items() if value or name not in _OPTIONAL} for fields in each]


def layers_of(model: Layers) -> tuple[LayerSpec, ...]:
    """The layers that own a KV cache, in execution order, from a sequence of them or an object that has `layers`.

    Raises:
        BudgetError: neither.
    """
    layers = given_layers(model)
    if layers is None:
        raise BudgetError(
            f"give the model's LayerSpecs or a transformed model, not a {type(model).__name__}; "
            "xkv_fx.Budgets.kv_bytes alone reads models"
        )
    return layers


def given_layers(model: object) -> tuple[LayerSpec, ...] | None:
    """As `layers_of`; None for a model that must be read to know them."""
    if isinstance(model, Sequence) and all(isinstance(spec, LayerSpec) for spec in model):
        return tuple(model)
    layers = getattr(model, "layers", None)
    if isinstance(layers, tuple) and layers and all(isinstance(spec, LayerSpec) for spec in layers):
        return layers
    return None

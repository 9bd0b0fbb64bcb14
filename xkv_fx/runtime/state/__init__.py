"""What is kept between calls: one file for each kind of state, and the plan that puts them together.

kv          keys and values in the model's dtype, with their positions, and their scores where these decide
coded       keys and values in fewer bits: codes, with scales of their own for each slot
latent      the latent and rotary key of multi-head latent attention, which are keys and values at once; in either form
indexed     keys and values or latents, with the keys by which an indexer picks what a query attends to
borrowed    the cache of an earlier attention, read by one that makes no keys and values of its own
recurrent   what a recurrent, linear-attention or convolution layer keeps, of fixed size
counters    how many tokens each row has seen

A kind says what it keeps, and what prefill, extend and decode do to it; everybody else iterates over what it says. A
new kind is a file here and a row in `plan.CACHE_KINDS`, if layers have it, or in `CachePlan.states`, if one serves all.
"""

from xkv_fx.runtime.state.base import GRAPH_KINDS, Attention, Buffer, Build, Constant, GraphKind, LayerState, Value
from xkv_fx.runtime.state.borrowed import BorrowedState
from xkv_fx.runtime.state.coded import CodedState
from xkv_fx.runtime.state.counters import CountersState
from xkv_fx.runtime.state.indexed import IndexedState
from xkv_fx.runtime.state.kv import KVState
from xkv_fx.runtime.state.latent import CodedLatentState, LatentState
from xkv_fx.runtime.state.plan import CACHE_KINDS, CachePlan
from xkv_fx.runtime.state.recurrent import RecurrentState
from xkv_fx.runtime.state.tensors import State

__all__ = [
    "CACHE_KINDS",
    "GRAPH_KINDS",
    "Attention",
    "BorrowedState",
    "Buffer",
    "Build",
    "CachePlan",
    "CodedLatentState",
    "CodedState",
    "Constant",
    "CountersState",
    "GraphKind",
    "IndexedState",
    "KVState",
    "LatentState",
    "LayerState",
    "RecurrentState",
    "State",
    "Value",
]

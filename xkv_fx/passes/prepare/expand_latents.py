"""In a prompt, attention over the heads' own keys and values, made again from the latents that are kept."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from xkv_fx.passes.analyses.absorbed_queries import AbsorbedQueries
from xkv_fx.passes.analyses.find_attention import AttentionSite, attention_sites
from xkv_fx.passes.base import GraphPass, PassRecord
from xkv_fx.passes.tools.graph import arguments, calls, run_fake
from xkv_fx.passes.tools.inline import inline

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class ExpandLatents(GraphPass):
    """Before: what is kept of a prompt, or scored, is taken from the inputs of its attentions. After: attentions of
    latents over one another are the model's own again, which cost less for many queries: heads are smaller than
    latents. What else reads the latents, and attention over slots, stays.

        attention([q_nope W_k, q_rope], [c, r], [c, r])[..., :rank] W_v'  ->  attention(q, [c W_k', r], c W_v')
    """

    name: ClassVar[str] = "expand_latents"

    def run(self, module: GraphModule) -> PassRecord:
        if not calls(module, torch.ops.xkv.attention.default):  # the scores of a single layer need none
            return PassRecord(self.name, 0, 0)
        sites = [site for site in attention_sites(module) if site.k is site.v]
        changed = sum(_expand(module, site) for site in sites)
        return PassRecord(self.name, len(sites), changed)


def _expand(module: GraphModule, site: AttentionSite) -> bool:
    """False where this is not what `AbsorbLatents` makes; it is right as it is."""
    queries, product = AbsorbedQueries.of(site), _product_behind(site.node)
    if queries is None or product is None:
        return False
    out = _only_user(_only_user(product))
    of_keys, of_values = _rows_of(queries.weights), _rows_of(product.args[1])
    if out is None or out.target is not aten.transpose.int or of_keys is None or of_values is None:
        return False
    expansion = _Expansion(of_keys[1:], of_values[1:], of_keys[0] is of_values[0], queries.start)
    with module.graph.inserting_before(site.node):
        keys, values = inline(module.graph, expansion.of, site.k, of_keys[0], of_values[0])
    site.node.args = (queries.q, keys, values, *site.node.args[3:])
    site.node.meta["val"] = run_fake(module.graph, site.node.target, site.node.args, site.node.kwargs)
    out.replace_all_uses_with(site.node)
    module.graph.eliminate_dead_code()
    return True


@dataclasses.dataclass(frozen=True)
class _Expansion:
    """How keys and values are made from a latent and its rotary key.

    Attributes:
        of_keys, of_values: heads, and which rows of each head's stride in the weight.
        one_map: both weights are the same.
        nope: where in a key the part made from the latent begins.
    """

    of_keys: tuple[int, int, int]
    of_values: tuple[int, int, int]
    one_map: bool
    nope: int

    def of(self, joined: Tensor, of_keys: Tensor, of_values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[rows, heads, S, ...]` from latents `[rows, 1, S, size]`."""
        rank = of_keys.shape[1]
        latent, rotary = joined[:, 0, :, :rank], joined[..., rank:]
        made = torch.nn.functional.linear(latent, of_keys)
        from_latent = _by_head(made, *self.of_keys)
        shared = rotary.expand(-1, self.of_keys[0], -1, -1)
        keys = torch.cat((from_latent, shared) if self.nope == 0 else (shared, from_latent), 3)
        made = made if self.one_map else torch.nn.functional.linear(latent, of_values)
        return keys, _by_head(made, *self.of_values)


def _by_head(made: Tensor, heads: int, first: int, stop: int) -> Tensor:
    return made.view(made.shape[0], made.shape[1], heads, -1).transpose(1, 2)[..., first:stop]


def _product_behind(attention: Node) -> Node | None:
    """The product by which an attention's output becomes that of its heads; None where it is used otherwise."""
    node = next((user for user in attention.users if user.target is aten.slice.Tensor), None)
    while node is not None and node.target is not aten.bmm.default:
        node = _only_user(node)
    return node


def _only_user(node: Node | None) -> Node | None:
    return next(iter(node.users)) if node is not None and len(node.users) == 1 else None


def _rows_of(weights: Any) -> tuple[Node, int, int, int] | None:
    """The weight `[heads * stride, rank]` that heads' rows are of, how many heads, and which rows of each stride."""
    node, bounds = weights, None
    while isinstance(node, Node) and node.target is not aten.view.default:
        if node.target is aten.slice.Tensor:
            given = arguments(node)
            if given["dim"] != 1 or bounds is not None:
                return None
            bounds = given["start"], given["end"]
        elif node.target not in (aten.transpose.int, aten.alias.default):
            return None
        node = node.args[0]
    if not isinstance(node, Node) or not isinstance(node.args[0], Node) or node.args[0].op != "get_attr":
        return None
    heads, stride, _ = node.meta["val"].shape
    return (node.args[0], heads, *(bounds or (0, stride)))

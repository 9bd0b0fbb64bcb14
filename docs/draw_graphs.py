"""The graphs around one attention, before and after the passes, as Mermaid diagrams for docs/how-it-works.md.

`python docs/draw_graphs.py` makes a Llama of one layer and rewrites the diagrams in that file, each of which stands
behind a comment with its name.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch.fx import GraphModule, Node
from transformers import LlamaConfig, LlamaForCausalLM

import xkv_fx
from xkv_fx.hf.capture import capture
from xkv_fx.hf.generation import BudgetedLM

PAGE = Path(__file__).parent / "how-it-works.md"
CAPACITY = 24
ABOVE, BELOW = 2, 1
"""How many steps from a node of ours are drawn."""


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, pad_token_id=0, eos_token_id=None)).eval()


def is_ours(node: Node) -> bool:
    return str(node.target).startswith("xkv.") or getattr(node.target, "__module__", "").startswith("xkv_fx.")


def drawn(module: GraphModule) -> str:
    """A Mermaid flow chart of the ops of ours in a graph, and of what stands next to them."""
    near = {node for node in module.graph.nodes if is_ours(node)}
    for _ in range(ABOVE):
        near |= {source for node in near for source in node.all_input_nodes if _is_tensor(source)}
    for _ in range(BELOW):
        near |= {user for node in near if is_ours(node) for user in node.users}
    lines = ["```mermaid", "flowchart TD"]
    for node in module.graph.nodes:
        if node in near:
            left, right = ("[[", "]]") if is_ours(node) else ("([", "])") if node.op == "placeholder" else ("[", "]")
            lines.append(f'    {node.name}{left}"{_label(node)}"{right}')
    for node in module.graph.nodes:
        lines += [f"    {source.name} --> {node.name}" for source in node.all_input_nodes if {source, node} <= near]
    return "\n".join([*lines, "```"])


def _label(node: Node) -> str:
    if node.op in ("placeholder", "output"):
        return node.name
    name = getattr(node.target, "__name__", str(node.target)).removesuffix(".default")
    given = [("", value) for value in node.args] + [(f"{key}=", value) for key, value in node.kwargs.items()]
    numbers = [f"{key}{value}" for key, value in given if isinstance(value, int) and is_ours(node)]
    return f"{name}({', '.join(numbers)})" if numbers else name


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def diagrams() -> dict[str, str]:
    """Their names, and their text."""
    model = tiny_model()
    llm = xkv_fx.transform(model, xkv_fx.Budgets((CAPACITY,)), backend="eager")
    assert isinstance(llm, BudgetedLM)
    return {"captured": drawn(capture(model).prompt), "prefill": drawn(llm.prefill), "decode": drawn(llm.decode)}


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, diagram in diagrams().items():
        pattern = rf"(<!-- graph: {name} -->\n)(```mermaid\n.*?\n```)?"
        text, count = re.subn(pattern, lambda found, new=diagram: found[1] + new, text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{PAGE} must have one line '<!-- graph: {name} -->'; it has {count}")
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

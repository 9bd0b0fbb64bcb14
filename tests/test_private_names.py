"""Names of torch and transformers that are not public, and that the package relies on: they are as they were read.

CONTRIBUTING.md lists them, and says why each is used. A version that drops or changes one fails here, by the name,
before it fails somewhere inside the package. Nothing private is used that is not listed.
"""

from __future__ import annotations

import ast
import ctypes
import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._inductor
import transformers
from import_graph import FILES, ROOT
from torch import nn
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.torch_version import TorchVersion
from transformers import GenerationMixin, LlamaConfig, PreTrainedModel

TORCH, TRANSFORMERS, PYTHON = "torch 2.13.0", "transformers 5.23.0", "Python 3.11"
"""What the names below were read from."""
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

Check = Callable[[str], None]
"""Raises an AssertionError, or whatever comes of it, where a name is not what it was."""


@dataclasses.dataclass(frozen=True)
class Private:
    """A name that its library may change at any time.

    Attributes:
        name: in full, as CONTRIBUTING.md has it.
        read_from: the version in which it is as it is used.
        check: that it still is.
        since: a version of its library that has it; the package does without it in older ones that lack it.
    """

    name: str
    read_from: str
    check: Check
    since: str = "0"


def found(name: str) -> Any:
    """What a dotted name stands for; a module is imported only where its package has no attribute of that name."""
    first, *others = name.split(".")
    value: Any = importlib.import_module(first)
    for end, part in enumerate(others, start=1):
        if not hasattr(value, part) and inspect.ismodule(value):
            importlib.import_module(".".join([first, *others[:end]]))
        value = getattr(value, part)
    return value


def is_there(name: str) -> None:
    found(name)


def takes(*positional: str, **named: str) -> Check:
    """That it can be called so; the words say what each argument is."""

    def check(name: str) -> None:
        inspect.signature(found(name)).bind(*positional, **named)

    return check


def has_arguments(*expected: str, results: int = 1) -> Check:
    """That an operator's arguments begin so, and that it returns so many tensors or more."""

    def check(name: str) -> None:
        schema = found(name).default._schema
        names = [argument.name for argument in schema.arguments]
        assert names[: len(expected)] == list(expected), f"its arguments are {', '.join(names)}"
        assert len(schema.returns) >= results, f"it returns {len(schema.returns)} values"

    return check


def has(*names: str, of: Any) -> Check:
    def check(name: str) -> None:
        missing = [name for name in names if not hasattr(of(), name)]
        assert not missing, f"there is no {', '.join(missing)}"

    return check


def is_inductor_setting(name: str) -> None:
    settings = torch._inductor.config.get_config_copy()
    assert name.removeprefix("torch._inductor.config.") in settings, "Inductor has no such setting"


def is_read_by_generate(name: str) -> None:
    assert hasattr(PreTrainedModel, name.rpartition(".")[2])
    assert f"self.{name.rpartition('.')[2]}" in inspect.getsource(GenerationMixin), "generate does not read it"


def is_noted_by_generate(name: str) -> None:
    assert f"generation_config.{name.rpartition('.')[2]} = " in inspect.getsource(GenerationMixin), "nobody sets it"


def has_the_table_of_attentions(name: str) -> None:
    assert isinstance(found(name).ALL_ATTENTION_FUNCTIONS, transformers.AttentionInterface)


def writes_formulas_of_sizes(name: str) -> None:
    size = ShapeEnv().create_unbacked_symint()
    assert (2 * size).node.expr.subs({size.node.expr: 3}) == 6


def makes_fake_tensors(name: str) -> None:
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fake: Any = mode.from_tensor(torch.zeros(2, 3), static_shapes=True)
    assert fake.fake_mode is mode
    with mode.shape_env.ignore_fresh_unbacked_symbols():  # type: ignore[union-attr]
        pass


def declares_what_our_operators_call(name: str) -> None:
    """Every function of torch's C interface in our C++ but those that it defines itself."""
    folder = Path(torch.__file__).parent / "include" / Path(name).parent
    declared = "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.h")))
    ours = (ROOT / "xkv_fx/runtime/kernels/ops_cpu.cpp").read_text(encoding="utf-8")
    called = set(re.findall(r"\baoti_torch_\w+", ours)) - set(re.findall(r"AOTITorchError (aoti_torch_\w+)", ours))
    missing = sorted(function for function in called if not re.search(rf"\b{function}\b", declared))
    assert called, "our C++ calls none of it any more"
    assert not missing, f"it does not declare {', '.join(missing)}"


def is_made_by_dynamic_rotary(name: str) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=16, num_attention_heads=2, rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    config.rope_parameters["rope_theta"] = 1e4
    assert hasattr(LlamaRotaryEmbedding(config), name.rpartition(".")[2])


ATTENTION = ("query", "key", "value", "dropout_p", "is_causal")
PRIVATE = (
    # How the attention "xkv" is made known
    Private("transformers.modeling_utils", TRANSFORMERS, has_the_table_of_attentions),
    # Capture and passes
    Private("torch._dynamo.exc.UserError", TORCH, is_there),
    Private("torch._dispatch.python.enable_python_dispatcher", TORCH, lambda name: found(name)().__enter__),
    Private("torch._subclasses.fake_tensor.FakeTensor", TORCH, makes_fake_tensors),
    Private("torch._subclasses.fake_tensor.FakeTensorMode", TORCH, makes_fake_tensors),
    Private("torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode", TORCH, is_there),
    Private("torch.fx.experimental.symbolic_shapes.is_concrete_int", TORCH, takes("size")),
    Private("torch.SymInt.node.expr", TORCH, writes_formulas_of_sizes),
    Private("torch.fx.config.do_not_emit_stack_traces", TORCH, is_there, since="2.13"),
    Private("torch.fx.Node._rename", TORCH, takes("node", "name")),
    Private("torch.utils._python_dispatch.TorchDispatchMode", TORCH, is_there),
    Private("torch.utils._pytree.tree_map", TORCH, takes("function", "tree")),
    Private("torch._ops.OpOverload", TORCH, is_there),
    Private("torch._ops.OpOverload._schema", TORCH, has("_schema", of=lambda: torch.ops.aten.add.Tensor)),
    Private("torch.nn.Module._parameters", TORCH, has("_parameters", of=nn.Module)),
    # Operators that stand in captured graphs
    Private("torch.ops.aten._assert_scalar", TORCH, has_arguments("self", "assert_msg", results=0)),
    Private("torch.ops.aten._assert_tensor_metadata", TORCH, has_arguments("a", results=0)),
    Private("torch.ops.aten._native_multi_head_attention", TORCH, has_arguments("query", "key", "value")),
    Private("torch.ops.aten._softmax", TORCH, has_arguments("self", "dim", "half_to_float")),
    Private("torch.ops.aten._to_copy", TORCH, has_arguments("self", "dtype")),
    Private("torch.ops.aten._unsafe_view", TORCH, has_arguments("self", "size")),
    # Operators that are called
    Private(
        "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
        TORCH,
        has_arguments(*ATTENTION, "attn_mask", "scale", results=2),
    ),
    Private(
        "torch.ops.aten._scaled_dot_product_flash_attention",
        TORCH,
        has_arguments(*ATTENTION, "return_debug_mask", "scale", results=2),
    ),
    Private(
        "torch.ops.aten._scaled_dot_product_efficient_attention",
        TORCH,
        has_arguments("query", "key", "value", "attn_bias", "compute_log_sumexp", results=2),
    ),
    Private("torch._higher_order_ops.while_loop", TORCH, takes("condition", "body", "carried")),
    Private("torch.ops._c10d_functional.all_reduce", TORCH, has_arguments("input", "reduce_op", "group_name")),
    Private(
        "torch.ops._c10d_functional.all_gather_into_tensor",
        TORCH,
        has_arguments("input", "group_size", "group_name"),
    ),
    Private("torch.ops._c10d_functional.wait_tensor", TORCH, has_arguments("tensor")),
    Private(
        "torch.fx.experimental.symbolic_shapes.ShapeEnv.create_symbol",
        TORCH,
        takes("self", 32, "source", "dynamic", None),
    ),
    Private(
        "torch.fx.experimental.symbolic_shapes.ShapeEnv.create_symintnode",
        TORCH,
        takes("self", "symbol", hint=32, source="source"),
    ),
    Private("torch.fx.experimental.symbolic_shapes.ShapeEnv.guards", TORCH, has("guards", of=ShapeEnv)),
    Private("torch.fx.experimental.symbolic_shapes.DimDynamic.DYNAMIC", TORCH, is_there),
    Private("torch._dynamo.source.ConstantSource", TORCH, takes("a name")),
    # Inductor and AOTInductor
    Private(
        "torch._inductor.standalone_compile",
        TORCH,
        takes("graph", "examples", dynamic_shapes="from_graph", options="settings"),
    ),
    Private("torch._inductor.config.cpp_wrapper", TORCH, is_inductor_setting),
    Private("torch._inductor.config.cpp_wrapper_build_separate", TORCH, is_inductor_setting),
    Private("torch._inductor.config.size_asserts", TORCH, is_inductor_setting),
    Private("torch._inductor.config.aot_inductor.custom_ops_to_c_shims", TORCH, is_inductor_setting),
    Private("torch._inductor.config.aot_inductor.metadata", TORCH, is_inductor_setting),
    Private("torch._inductor.config.aot_inductor.enable_line_tables", TORCH, is_inductor_setting, since="2.13"),
    Private("torch._inductor.config.cpp.dynamic_threads", TORCH, is_inductor_setting),
    Private("torch._inductor.config.cpp.march", TORCH, is_inductor_setting, since="2.13"),
    Private("torch._inductor.config.get_config_copy", TORCH, takes()),
    Private("torch._inductor.config.patch", TORCH, takes("settings")),
    Private(
        "torch._inductor.aoti_compile_and_package",
        TORCH,
        takes("program", package_path="a file", inductor_configs="settings"),
    ),
    Private("torch._inductor.aoti_load_package", TORCH, takes("a file")),
    Private(
        "torch._inductor.package.package.AOTICompiledModel.loader",
        TORCH,
        lambda name: found(name[:-7])("loader").loader,
    ),
    Private("torch._inductor.config.cpp.vec_isa_ok", TORCH, is_inductor_setting),
    Private("torch._inductor.codecache.CppCodeCache.load", TORCH, takes("source", extra_flags="flags")),
    Private("torch/csrc/inductor/aoti_torch/c/shim.h", TORCH, declares_what_our_operators_call),
    Private("ctypes.CDLL._name", PYTHON, has("_name", of=lambda: ctypes.CDLL(None))),
    # The backend of torch.compile
    Private("torch._dynamo.symbolic_convert.InstructionTranslator.current_tx", TORCH, takes()),
    Private(
        "torch._dynamo.exc.TensorifyScalarRestartAnalysis", TORCH, lambda name: found(name)(restart_reason="a test")
    ),
    Private("torch._dynamo.maybe_mark_dynamic", TORCH, takes("tensor", "dimension")),
    Private("torch.Tensor._dynamo_weak_dynamic_indices", TORCH, lambda name: _marked(name.rpartition(".")[2])),
    Private("torch._dynamo.reset", TORCH, takes()),
    Private("torch._dynamo.utils.counters", TORCH, lambda name: found(name)["stats"]),
    Private("torch._C._set_grad_enabled", TORCH, is_there),
    Private("torch._C._log_api_usage_once", TORCH, is_there),
    Private(
        "torch._dynamo.OptimizedModule._orig_mod",
        TORCH,
        has("_orig_mod", of=lambda: torch.compile(nn.Linear(1, 1), backend="eager")),
    ),
    # transformers' models and generate
    Private("transformers.GenerationMixin._is_stateful", TRANSFORMERS, is_read_by_generate),
    Private("transformers.GenerationConfig._mask_length", TRANSFORMERS, is_noted_by_generate, since="5.23"),
    Private(
        "transformers.GenerationMixin._prepare_cache_for_generation",
        TRANSFORMERS,
        takes("self", "generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length"),
    ),
    Private(
        "transformers.PreTrainedConfig._attn_implementation",
        TRANSFORMERS,
        has("_attn_implementation", of=transformers.PreTrainedConfig),
    ),
    Private("transformers.PreTrainedModel._from_config", TRANSFORMERS, takes("config", attn_implementation="eager")),
    Private("LlamaRotaryEmbedding.rope_type", TRANSFORMERS, is_made_by_dynamic_rotary),
    Private("LlamaRotaryEmbedding.inv_freq", TRANSFORMERS, is_made_by_dynamic_rotary),
    Private("LlamaRotaryEmbedding.original_inv_freq", TRANSFORMERS, is_made_by_dynamic_rotary),
    Private("LlamaRotaryEmbedding.original_max_seq_len", TRANSFORMERS, is_made_by_dynamic_rotary),
    Private("accelerate.hooks._hf_hook", "accelerate 1.15.0", lambda name: _hooked(name.rpartition(".")[2])),
)
NAMES = {private.name for private in PRIVATE}


def _marked(attribute: str) -> None:
    tensor = torch.zeros(2, 3)
    torch._dynamo.maybe_mark_dynamic(tensor, 1)
    assert getattr(tensor, attribute) == {1}


def _hooked(attribute: str) -> None:
    hooks = importlib.import_module("accelerate.hooks")
    module = nn.Linear(1, 1)
    hooks.add_hook_to_module(module, hooks.ModelHook())
    assert hasattr(module, attribute)


def fault(private: Private) -> str | None:
    """What is wrong with a name, for whoever meets a new version; None if it is as it was read."""
    try:
        private.check(private.name)
    except (AssertionError, AttributeError, ImportError, KeyError, OSError, TypeError) as error:
        return (
            f"{private.name}, read from {private.read_from}, is gone or is another: {error or 'not as it was'}. "
            f"CONTRIBUTING.md says what it is for; it is used in {', '.join(used_in(private.name)) or 'no file'}"
        )
    return None


@pytest.mark.parametrize("private", PRIVATE, ids=lambda private: private.name)
def test_a_private_name_is_as_it_was_read(private: Private) -> None:
    library = private.read_from.partition(" ")[0]
    if library != "Python" and TorchVersion(importlib.metadata.version(library)) < private.since:
        pytest.skip(f"this {library} may lack it, and the package does without then")
    wrong = fault(private)
    assert wrong is None, wrong


@pytest.mark.parametrize(
    ("name", "check", "what"),
    [
        ("torch._inductor.gone", is_there, "No module named 'torch._inductor.gone'"),
        ("torch.Tensor.gone", is_there, "has no attribute 'gone'"),
        ("torch._dynamo.reset", takes("an argument"), "too many positional arguments"),
        ("torch.ops.aten._softmax", has_arguments("self", "axis"), "its arguments are self, dim, half_to_float"),
        ("torch.ops.aten._softmax", has_arguments("self", results=2), "it returns 1 values"),
        ("torch._inductor.config.gone", is_inductor_setting, "Inductor has no such setting"),
    ],
)
def test_a_changed_name_is_said_in_a_sentence(name: str, check: Check, what: str) -> None:
    wrong = fault(Private(name, "torch 0.1", check))
    assert wrong is not None
    assert wrong.startswith(f"{name}, read from torch 0.1, is gone or is another: ")
    assert what in wrong


def test_dynamo_hands_a_backend_what_ours_reads() -> None:
    """Weights by the names of their inputs, example values, the frame that is compiled, and one more trace if asked."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    layer, x = Layer(), torch.randn(2, 3)
    seen: list[dict[str, Any]] = []

    def backend(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        nodes = [node for node in module.graph.nodes if node.op == "placeholder"]
        seen.append({node.target: node.meta["example_value"] for node in nodes})
        frame: Any = InstructionTranslator.current_tx()
        assert frame.f_locals["self"] is layer, "the frame that is compiled is the model's"
        if len(seen) == 1:
            torch._dynamo.maybe_mark_dynamic(x, 0)
            raise torch._dynamo.exc.TensorifyScalarRestartAnalysis(restart_reason="a size is left open")
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend=backend)(x), layer(x))
    torch._dynamo.reset()
    assert len(seen[0]) == 3, f"a layer's inputs are its two weights and what it is given: {seen}"
    weights = [name for name in seen[0] if re.search(r"_(modules|parameters|buffers)_", name)]
    assert len(weights) == 2, f"the names of inputs do not say which are weights: {list(seen[0])}"
    assert len(seen) == 2, "a backend can no longer have a graph traced again"
    assert any(isinstance(value, torch.SymInt) for value in seen[1].values()), "the size was not left open"


# --- nothing else that is private is used ---


def private_names(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of everything with a leading underscore that a file reads of torch, of transformers, or of an
    object that may be theirs; such a one by its last name alone, as in `._schema`."""
    tree = ast.parse(source)
    aliases = {
        node.targets[0].id: ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and _root(node.value) == "torch"
    }
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("torch", "transformers"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute) and _root(node) in ("torch", "transformers", *aliases):
            chain = ast.unparse(node)
            root = chain.partition(".")[0]
            names = [] if id(node) in inner else [chain.replace(root, aliases.get(root, root), 1)]
        elif isinstance(node, ast.Attribute):
            names = [f".{node.attr}"]
        elif isinstance(node, ast.Call) and _root(node.func) in ("getattr", "hasattr", "setattr"):
            named = node.args[1]
            names = [f".{named.value}"] if isinstance(named, ast.Constant) else []
        else:
            continue
        yield from ((node.lineno, name) for name in names if re.search(r"(^|\.)_(?!_)", name))


def _root(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def own_names(source: str) -> set[str]:
    """Names that a file defines or sets, which are no other library's."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return found


@functools.cache
def sources() -> dict[str, str]:
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in FILES}


def used_in(name: str) -> list[str]:
    last = re.split(r"[./](?=\w+$)", name)[-1]
    return [path for path, text in sources().items() if re.search(rf"\b{last}\b", text)]


def is_listed(name: str) -> bool:
    if name.startswith("."):
        return any(listed.endswith(name) for listed in NAMES)
    return any(f"{name}.".startswith(f"{listed}.") or f"{listed}.".startswith(f"{name}.") for listed in NAMES)


def test_every_private_name_that_is_used_is_listed() -> None:
    ours = set().union(*map(own_names, sources().values()))
    unlisted = [
        f"{path}:{line} {name}"
        for path, text in sources().items()
        for line, name in private_names(text)
        if not is_listed(name) and name.removeprefix(".") not in ours
    ]
    assert not unlisted, f"list these in PRIVATE above, and in CONTRIBUTING.md say why they are used: {unlisted}"


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_listed_name_is_used_and_explained(name: str) -> None:
    if name.endswith(".h"):
        assert name in (ROOT / "xkv_fx/runtime/kernels/ops_cpu.cpp").read_text(encoding="utf-8")
    else:
        assert used_in(name), f"nothing uses {name} any more: take it out here and in CONTRIBUTING.md"
    assert f"`{name}`" in CONTRIBUTING, f"say in CONTRIBUTING.md why {name} is used"


@pytest.mark.parametrize("name", ["_is_stateful", "_prepare_cache_for_generation"])
def test_what_the_transformed_model_overrides_is_listed(name: str) -> None:
    from xkv_fx.hf.generation import BudgetedLM

    assert name in vars(BudgetedLM)
    assert is_listed(f".{name}")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch._dynamo", "torch._dynamo"),
        ("from torch._dynamo.exc import UserError", "torch._dynamo.exc.UserError"),
        ("from torch.utils._pytree import tree_map", "torch.utils._pytree.tree_map"),
        ("torch._inductor.config.patch({})", "torch._inductor.config.patch"),
        ("aten = torch.ops.aten\naten._softmax.default", "torch.ops.aten._softmax.default"),
        ("getattr(model, '_is_stateful', False)", "._is_stateful"),
        ("node.target._schema.arguments", "._schema"),
    ],
)
def test_every_way_to_a_private_name_is_seen(source: str, name: str) -> None:
    assert [name for _, name in private_names(source)] == [name]

"""The package's face: lazy, complete, and the same to a reader, a type checker and the package index."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import xkv_fx
from xkv_fx import errors

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(set(xkv_fx.__all__) - {"__version__"})


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "use",
    [
        "xkv_fx",
        "dir(xkv_fx)",
        "xkv_fx.Budgets.uniform(4, 16).kv_bytes([xkv_fx.LayerSpec(2, 1, 8, 8, 2)] * 4)",
        "xkv_fx.Policy, xkv_fx.XkvError",
        "xkv_fx.budgets.Provenance",
    ],
)
def test_import_and_plans_load_neither_torch_nor_transformers(use: str) -> None:
    code = f"import sys, xkv_fx; {use}; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    assert run_python(code) == "[]"


@pytest.mark.parametrize("name", NAMES)
def test_public_name_resolves_to_its_home(name: str) -> None:
    home = importlib.import_module(xkv_fx._HOMES[name])
    assert getattr(xkv_fx, name) is getattr(home, name)
    assert name in vars(xkv_fx), "a name is looked up once and then kept"
    assert inspect.getdoc(getattr(xkv_fx, name)), "a public name is documented"


def test_lists_of_public_names_agree() -> None:
    assert sorted(xkv_fx._HOMES) == NAMES
    assert set(NAMES) <= set(dir(xkv_fx))
    for_type_checkers = {}
    for node in ast.walk(ast.parse(inspect.getsource(xkv_fx))):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for statement in node.body:
                assert isinstance(statement, ast.ImportFrom)
                for alias in statement.names:
                    for_type_checkers[alias.name] = statement.module
    assert for_type_checkers == xkv_fx._HOMES


def test_every_error_is_public() -> None:
    ours = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert ours <= set(NAMES)
    assert all(issubclass(getattr(xkv_fx, name), xkv_fx.XkvError) for name in ours)


def test_star_import_gives_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from xkv_fx import *", names)
    assert {name: names[name] for name in xkv_fx.__all__} == {name: getattr(xkv_fx, name) for name in xkv_fx.__all__}
    assert names["__version__"] == xkv_fx.__version__


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'xkv_fx' has no attribute 'Bugdets'"):
        _ = xkv_fx.Bugdets  # type: ignore[attr-defined]
    with pytest.raises(ImportError):
        exec("from xkv_fx import Bugdets")
    assert not hasattr(xkv_fx, "__wrapped__")


def test_version_is_the_project_files() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert xkv_fx.__version__ == project["version"]


def test_kv_bytes_of_a_model_reads_its_layers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    layer = xkv_fx.LayerSpec(query_heads=4, kv_heads=2, key_dim=8, value_dim=8, itemsize=4)
    budgets = xkv_fx.Budgets((1, 2, 3))
    assert budgets.kv_bytes(LlamaForCausalLM(config)) == budgets.kv_bytes((layer,) * 3) == 6 * 2 * 16 * 4


@pytest.mark.parametrize("half", ["passes", "runtime"])
def test_root_link_shows_the_package_folder(half: str) -> None:
    link = ROOT / half
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == ROOT / "xkv_fx" / half

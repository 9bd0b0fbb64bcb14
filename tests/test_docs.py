"""Every block of Python in README and docs runs, in order and as it stands, and nothing public is left out of them."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from exhaustive import EXHAUSTIVE, exhaustive
from ready_models import remember_programs
from saved_models import save_model
from tiny_models import random_ids
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import xkv_fx
from xkv_fx import cli
from xkv_fx.capture.captured import CapturedModel
from xkv_fx.engines import trace
from xkv_fx.hf import capture as capturing
from xkv_fx.planning.solve import allocators, peer_allocators  # noqa: F401  (registered before names are patched)
from xkv_fx.runtime.scorers import base

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
trace_once = functools.cache(trace.trace_program)
SLOW = ("README.md", "api.md", "engines.md", "serving.md")
"""Pages whose blocks take half a minute; `make test-exhaustive` runs them."""
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[tuple[int, str]]:
    """The line that each block of Python starts on, and its text."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, found.start(1)) + 1, found[1]) for found in BLOCK.finditer(text)]


def words(count: int, seed: int) -> str:
    return " ".join(f"w{token}" for token in random_ids(1, count, seed)[0].tolist())


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `path/to/model` is a whole model with a tokenizer, small and random."""
    folder = tmp_path_factory.mktemp("docs")
    save_model(folder / "path/to/model")
    return folder


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_folder / "path/to/model")


captures: dict[tuple[int, int], CapturedModel] = {}
"""Of the one model of this file, for so many rows."""


@pytest.fixture
def _as_in_a_new_program(model_folder: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """In a folder with the model in it. Unless everything is run, nothing is compiled, and nothing is done twice."""
    torch._dynamo.reset()
    (tmp_path / "path").symlink_to(model_folder / "path")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(base, "_scorers", dict(base._scorers))
    monkeypatch.setattr(allocators, "_allocators", dict(allocators._allocators))
    if not EXHAUSTIVE:
        _spare_time(model, monkeypatch)
    attention = model.config._attn_implementation
    yield
    model.set_attn_implementation(attention)
    model._compiled_call_impl = None


def _spare_time(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    capture, transform, export, load = capturing.capture, xkv_fx.transform, xkv_fx.export, xkv_fx.load

    def once(source: Any, rows: int = 1, check: bool = True, decode: bool = True) -> CapturedModel:
        if source is not model or source.config._attn_implementation == "xkv":
            return capture(source, rows, check, decode)
        if (id(source), rows) not in captures:
            captures[id(source), rows] = capture(source, rows, check)
        return captures[id(source), rows]

    monkeypatch.setattr(capturing, "capture", once)
    remember_programs(monkeypatch)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda path: model)
    monkeypatch.setattr(trace, "trace_program", trace_once)
    monkeypatch.setattr(xkv_fx, "transform", functools.partial(transform, backend="eager"))
    monkeypatch.setattr(xkv_fx, "export", functools.partial(export, target="pt2"))
    monkeypatch.setattr(xkv_fx, "load", functools.partial(load, trust=True))
    compile_ = torch.nn.Module.compile

    def without_compiler(self: Any, *args: Any, options: Any = None, **kwargs: Any) -> Any:
        return compile_(self, *args, options={**options, "lower": "eager"}, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "compile", without_compiler)


@pytest.mark.usefixtures("_as_in_a_new_program")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=[exhaustive] if page.name in SLOW else [])
        for page in PAGES
        if blocks(page)
    ],
)
def test_code_blocks_run(page: Path, model: Any, model_folder: Path) -> None:
    """What a page takes for granted is given to it here: a model, its tokenizer, texts and prompts of its user's."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder / "path/to/model")
    ids = random_ids(1, 40)
    given: dict[str, Any] = {
        "xkv_fx": xkv_fx,
        "model": model,
        "tokenizer": tokenizer,
        "texts": [words(90, seed) for seed in range(2)],
        "prompts": [random_ids(1, 90, seed) for seed in range(2)],
        "held_out_prompts": [random_ids(1, 100, seed) for seed in range(2, 4)],
        "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "ids": ids,
        "budgets": xkv_fx.Budgets((12, 20)),
    }
    for line, code in blocks(page):
        if page.name == "README.md":  # its sections are read apart: what one has planned is not what another serves
            given["budgets"] = xkv_fx.Budgets((12, 20))
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), given)


def test_every_public_name_and_command_is_in_the_docs() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    code = "\n".join(block for page in PAGES for _, block in blocks(page))
    for name in set(xkv_fx.__all__) - {"__version__"}:
        assert re.search(rf"\bxkv_fx\.{name}\b", code), f"no block of code in README and docs uses xkv_fx.{name}"
    for command in typer.main.get_command(cli.app).commands:  # type: ignore[attr-defined]
        assert re.search(rf"xkv-fx {command}\b", text), f"the docs lack xkv-fx {command}"
    for name in (*base.scorer_names(), *allocators.allocator_names()):
        assert f"`{name}`" in text or f'"{name}"' in text, f"the docs lack {name}"


@functools.cache
def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
            if target.startswith("http"):
                continue
            path = page.parent / target if target else page
            assert path.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in headings(path), f"{page.name}: {target} has no heading #{anchor}"


def test_the_readme_is_short_and_says_what_this_is_not() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    for promised in ("make demo", "make test", "2412.05896", "It is **not** *xKV", "2503.18893"):
        assert promised in text


def test_the_index_of_the_docs_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, f"docs/README.md lacks {page.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_commands_in_the_docs_exist(page: Path) -> None:
    """Programs by their module, commands of xkv-fx with their options, files that are run, targets of make."""
    text = re.sub(r"\\?\n\s*", " ", page.read_text(encoding="utf-8"))
    for module in re.findall(r"python -m (xkv_fx[\w.]*)", text):
        assert importlib.util.find_spec(module), f"python -m {module}"
    for file in re.findall(r"python (?:-m pytest )?((?:docs|examples|tests)/[\w./]+)", text):
        assert (ROOT / file).exists(), file
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert target in targets, f"make {target}"
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    for name, rest in re.findall(r"`xkv-fx ([a-z]+) ([^`|]*)`", text):
        known = {option for parameter in commands[name].params for option in parameter.opts + parameter.secondary_opts}
        unknown = set(re.findall(r"--[a-z-]+", rest)) - known
        assert not unknown, f"xkv-fx {name} has no {', '.join(unknown)}"

"""Engines: what the transformed model does, a folder does too; and a folder that is not whole does nothing."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ready_models
import torch
from batches import padded
from exhaustive import EXHAUSTIVE, exhaustive
from sealed_json import sealed
from tiny_models import VOCABULARY, random_ids
from typer.testing import CliRunner

import xkv_fx
from xkv_fx import Budgets, Policy, PromptError, cli
from xkv_fx.engines.manifest import Manifest
from xkv_fx.runtime.choose_tokens import token_chooser

ROOT = Path(__file__).resolve().parents[2]
CAPACITIES = (12, 16)
END = 7
# Compiling takes minutes. What is around the packages is the same for both targets.
TARGET = "aoti" if EXHAUSTIVE else "pt2"


@pytest.fixture(scope="module")
def llm() -> Any:
    made = ready_models.transform_again(Budgets(CAPACITIES), rows=2)
    made.generation_config.pad_token_id = 1
    return made


@pytest.fixture(scope="module")
def folder(llm: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engines") / "llama"
    with torch._inductor.config.patch({"aot_inductor.debug_compile": True}):  # compiles faster, runs slower
        xkv_fx.export(llm, path, target=TARGET)
    return path


def load(folder: Path) -> xkv_fx.Engine:
    return xkv_fx.load(folder, trust=TARGET == "pt2")


@pytest.fixture(scope="module")
def engine(folder: Path) -> xkv_fx.Engine:
    return load(folder)


@pytest.mark.parametrize("length", [1, 2, 9, 30])
def test_tokens_are_those_of_the_transformed_model(llm: Any, engine: xkv_fx.Engine, length: int) -> None:
    ids = random_ids(2, length)
    expected = llm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    assert torch.equal(engine.generate(ids, 24), expected)


def test_the_plan_is_the_models(llm: Any, engine: xkv_fx.Engine) -> None:
    assert type(engine.budgets) is Budgets
    assert engine.budgets == llm.budgets


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_batches(llm: Any, engine: xkv_fx.Engine, side: str) -> None:
    ids, valid = padded([random_ids(1, 5), random_ids(1, 21, seed=1)], side)
    session = llm.new_session().session
    logits = session.feed(ids, valid=valid)
    ours = engine.new_session()
    assert torch.allclose(ours.feed(ids, valid=valid), logits, atol=1e-4)
    generated = engine.generate(ids, 8, attention_mask=valid)
    assert torch.equal(generated[:, ids.shape[1]], logits[:, -1].argmax(-1))


def test_turns_and_steps_leave_the_same_state(llm: Any, engine: xkv_fx.Engine) -> None:
    expected, ours = llm.new_session().session, engine.new_session()
    where = [tensor.data_ptr() for tensor in ours.state.tensors]
    for turn in (random_ids(2, 17), random_ids(2, 1, seed=1), random_ids(2, 6, seed=2)):
        logits = expected.feed(turn)
        assert torch.allclose(ours.feed(turn), logits, atol=1e-4)
        for _ in range(3):
            token = logits[:, -1].argmax(-1, keepdim=True)
            logits = expected.step(token)
            assert torch.allclose(ours.step(token), logits, atol=1e-4)
    for one, other in zip(ours.state.tensors, expected.state.tensors, strict=True):
        assert torch.allclose(one.double(), other.double(), atol=1e-4)
    assert [tensor.data_ptr() for tensor in ours.state.tensors] == where


def test_sessions_are_independent(engine: xkv_fx.Engine) -> None:
    ids = random_ids(2, 9)
    first, second = engine.new_session(), engine.new_session()
    whole = engine.generate(ids, 6, session=first)
    engine.generate(random_ids(2, 14, seed=3), 6, session=second)
    again = engine.generate(ids, 6, session=engine.new_session())
    assert torch.equal(whole, again)
    assert first.seen == (14, 14)


def test_a_row_that_ended_is_padded_as_by_the_transformed_model(llm: Any, folder: Path, engine: xkv_fx.Engine) -> None:
    ids = random_ids(2, 9)
    free = engine.generate(ids, 12)
    row, column = next(
        (row, column)
        for column in range(10, 20)
        for row in range(2)
        if int(free[row, column]) not in set(free[:, 9:column].flatten().tolist())
    )
    end = int(free[row, column])
    expected = llm.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=end, pad_token_id=1
    )
    ended = load(edited(folder, lambda data: data.update(end_tokens=[end])))
    assert torch.equal(ended.generate(ids, 12), expected)


def test_bytes_are_those_of_the_plan(llm: Any, folder: Path, engine: xkv_fx.Engine) -> None:
    assert (engine.kv_bytes, engine.state_bytes) == (llm.kv_bytes, llm.state_bytes)
    assert engine.new_session().state.kv_bytes == llm.kv_bytes
    assert engine.budgets == llm.budgets
    described = engine.describe()
    assert "28 slots in 2 layers" in described
    assert TARGET in described
    weights = {tensor.data_ptr(): tensor.nbytes for tensor in ready_models.model().parameters()}
    assert sum(weights.values()) <= (folder / "weights.safetensors").stat().st_size < 1.2 * sum(weights.values())


def test_prompts_that_cannot_be_are_refused(engine: xkv_fx.Engine) -> None:
    ids = random_ids(2, 5)
    for wrong, message in (
        (ids[:1], "1 rows"),
        (ids.int(), "int64"),
        (ids[:, :0], "empty"),
        (ids.clone().fill_(VOCABULARY), f"the token {VOCABULARY}"),
        (ids.clone().fill_(-1), "the token -1"),
    ):
        with pytest.raises(xkv_fx.PromptError, match=message):
            engine.generate(wrong, 4)
    with pytest.raises(xkv_fx.PromptError, match="max_new_tokens"):
        engine.generate(ids, 0)
    with pytest.raises(xkv_fx.PromptError, match="nothing but padding"):
        engine.generate(ids, 4, attention_mask=torch.zeros_like(ids))
    with pytest.raises(xkv_fx.PromptError, match="positions"):
        engine.generate(random_ids(2, engine.manifest.max_positions + 1), 4)  # type: ignore[operator]
    with pytest.raises(xkv_fx.SessionError):
        engine.generate(ids, 4, session=ready_models.full(2).new_session().session)
    with pytest.raises(xkv_fx.BackendError, match="last token only"):
        engine.new_session().feed(ids, all_logits=True)


def test_loading_and_running_need_torch_alone(llm: Any, folder: Path) -> None:
    ids = random_ids(2, 9)
    expected = llm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    program = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("transformers", "tokenizers", "huggingface_hub"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import torch, xkv_fx
engine = xkv_fx.load({str(folder)!r}, trust=True)
print(engine.generate(torch.tensor({ids.tolist()}), 8).tolist())
assert "transformers" not in sys.modules
rooms = ("xkv_fx.capture", "xkv_fx.passes", "xkv_fx.lowering.program", "xkv_fx.runtime.ops")
assert not [name for name in sys.modules if name.startswith(rooms)]
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected.tolist()


@exhaustive
def test_the_example_generates_the_same_without_us(llm: Any, folder: Path) -> None:
    ids = random_ids(1, 9).expand(2, -1).contiguous()
    expected = llm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    prompt = ",".join(map(str, ids[0].tolist()))
    command = [sys.executable, "-I", str(ROOT / "examples" / "run_engine.py"), str(folder), prompt, "--new", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ",".join(map(str, expected[0, 9:].tolist()))


@exhaustive
@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("c++")), reason="no cmake or no C++ compiler")
def test_the_cpp_example_generates_the_same(llm: Any, folder: Path, tmp_path: Path) -> None:
    ids = random_ids(1, 9).expand(2, -1).contiguous()
    expected = llm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    source = ["-S", str(ROOT / "examples" / "cpp"), "-B", str(tmp_path), "-DCMAKE_BUILD_TYPE=Release", prefix]
    subprocess.run(["cmake", *source], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(tmp_path)], check=True, capture_output=True)
    prompt = ",".join(map(str, ids[0].tolist()))
    command = [str(tmp_path / "run_engine"), str(folder), prompt, "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ",".join(map(str, expected[0, 9:].tolist()))


def test_inspect(llm: Any, folder: Path) -> None:
    runner = CliRunner()
    result = runner.invoke(cli.app, ["inspect", str(folder), "--json"])
    found = json.loads(result.stdout)
    assert found["checks"] == {"machine": "ok", "files": "ok", "packages": "ok"}
    assert (found["kv_bytes"], found["slots"], found["batch_size"]) == (llm.kv_bytes, list(CAPACITIES), 2)
    other = edited(folder, set_at("machine", "torch", to="2.1.0"))
    result = runner.invoke(cli.app, ["inspect", str(other)])
    assert "built for torch 2.1.0" in " ".join(result.stdout.split())


def edited(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The same engine with another manifest; its files are the very same."""
    twin = folder.parent / f"twin_{hashlib.sha256(os.urandom(8)).hexdigest()[:8]}"
    shutil.copytree(folder, twin, copy_function=os.link)
    manifest = twin / "manifest.json"
    data = json.loads(manifest.read_text())
    change(data)
    manifest.unlink()
    manifest.write_text(json.dumps(sealed(data)))
    return twin


def set_at(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: Any) -> None:
        for step in path[:-1]:
            data = data[step]
        data[path[-1]] = to

    return change


def renamed(name: str) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        data["packages"]["decode"]["file"] = name
        data["files"][name] = data["files"].pop("decode.pt2")

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("version", to=4), "newer"),
        (set_at("version", to=2), "format version 2 is older than 3"),
        (set_at("version", to="1"), "version"),
        (set_at("format", to="xkv_fx.budgets"), "not a xkv_fx.engine"),
        (set_at("machine", "torch", to="2.1.0"), "built for torch 2.1.0"),
        (set_at("machine", "instructions", to="AVX1024"), "instruction set AVX1024"),
        (set_at("machine", "architecture", to="vax"), "processor vax"),
        (set_at("machine", "device", to="tpu"), "device 'tpu'"),
        (set_at("machine", "device", to=3), "wrong type"),
        (set_at("target", to="exe"), "target 'exe'"),
        (set_at("batch_size", to=0), "batch_size"),
        (set_at("batch_size", to=True), "batch_size"),
        (set_at("batch_size", to=3), "do not match the package"),
        (set_at("dtype", to="float63"), "dtype"),
        (set_at("vocabulary", to="many"), "vocabulary"),
        (set_at("known_tokens", to=10**6), "other budgets, weights or shapes"),
        (set_at("end_tokens", to=[-1]), "end_tokens"),
        (set_at("end_tokens", to={}), "end_tokens"),
        (set_at("budgets", "capacities", to=[12, 20]), "budgets do not match the package prefill"),
        (set_at("budgets", "capacities", to=[12]), "1 capacities"),
        (set_at("budgets", "capacities", to=[12, 0]), "at least 1"),
        (set_at("budgets", "policy", "eviction", to="scored"), "do not match the package"),
        (set_at("budgets", "policy", "recent", to=2), "other budgets, weights or shapes"),
        (set_at("budgets", "policy", "scorer", to="h2o"), "other budgets, weights or shapes"),
        (set_at("budgets", to=[]), "budgets"),
        (set_at("layers", 0, "kv_heads", to=1), "do not match the package"),
        (set_at("layers", 0, "kv_heads", to=-1), "at least 1"),
        (set_at("layers", to=[]), "no layers|0 layers"),
        (set_at("room", to=-1), "max_new_tokens"),
        (set_at("packages", "decode", "inputs", to=[]), "0"),
        (set_at("packages", "decode", "weights", to=["no such weight"]), "no such weight"),
        (set_at("packages", "decode", to=None), "package"),
        (set_at("weights", 0, "shape", to=[3, -1]), "shape"),
        (set_at("weights", 0, "shape", to=[3, 1]), "other budgets, weights or shapes"),
        (set_at("weights", to=[]), "no weight"),
        (set_at("extra", to=1), "unknown field 'extra'"),
        (set_at("files", "decode.pt2", "bytes", to=1), "bytes instead of"),
        (set_at("files", "decode.pt2", "sha256", to="0" * 64), "SHA-256"),
        (set_at("files", "tokenizer/none.json", to={"bytes": 1, "sha256": ""}), "no such file"),
        (renamed("../decode.pt2"), "outside"),
        (renamed("/tmp/decode.pt2"), "outside"),
        (renamed("a/../decode.pt2"), "outside"),
        (renamed("C:decode.pt2"), "outside"),
        (lambda data: data.pop("machine"), "lacks 'machine'"),
        (lambda data: data["files"].pop("weights.safetensors"), "does not name weights.safetensors"),
        (lambda data: data["packages"].pop("extend"), "packages"),
    ],
)
def test_a_wrong_manifest_is_refused(folder: Path, change: Any, message: str) -> None:
    twin = edited(folder, change)
    with pytest.raises((xkv_fx.EngineError, xkv_fx.FileFormatError), match=message) as raised:
        load(twin)
    assert twin.name in str(raised.value)


@pytest.mark.parametrize("name", ["decode.pt2", "weights.safetensors"])
def test_a_changed_byte_is_found(folder: Path, tmp_path: Path, name: str) -> None:
    twin = Path(shutil.copytree(folder, tmp_path / "twin"))
    content = bytearray((twin / name).read_bytes())
    content[len(content) // 2] ^= 1
    (twin / name).write_bytes(content)
    with pytest.raises(xkv_fx.FileFormatError, match=f"{name}: its SHA-256"):
        load(twin)


@pytest.mark.parametrize("name", ["manifest.json", "decode.pt2", "weights.safetensors"])
def test_missing_and_cut_files_are_found(folder: Path, tmp_path: Path, name: str) -> None:
    twin = Path(shutil.copytree(folder, tmp_path / "twin"))
    content = (twin / name).read_bytes()
    (twin / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(xkv_fx.FileFormatError, match=name):
        load(twin)
    (twin / name).unlink()
    with pytest.raises(xkv_fx.FileFormatError, match=name):
        load(twin)
    (twin / name).symlink_to(folder / name)
    if name != "manifest.json":
        with pytest.raises(xkv_fx.FileFormatError, match=f"{name}: a link"):
            load(twin)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(xkv_fx.FileFormatError, match="not an engine's folder"):
            xkv_fx.load(path)
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(xkv_fx.FileFormatError, match="not valid JSON"):
        xkv_fx.load(tmp_path)


@exhaustive
def test_a_package_with_more_in_it_than_code_is_refused(folder: Path, tmp_path: Path) -> None:
    """torch would read a pickle that it found there."""
    twin = Path(shutil.copytree(folder, tmp_path / "twin"))
    with zipfile.ZipFile(twin / "decode.pt2", "a") as archive:
        archive.writestr("decode/models/model.json", "{}")
    rehash(twin, "decode.pt2")
    with pytest.raises(xkv_fx.FileFormatError, match="no part of compiled code"):
        load(twin)


def test_packages_of_another_kind_are_refused(folder: Path, tmp_path: Path) -> None:
    twin = Path(shutil.copytree(folder, tmp_path / "twin"))
    shutil.copy(twin / "prefill.pt2", twin / "extend.pt2")
    rehash(twin, "extend.pt2")
    with pytest.raises(xkv_fx.EngineError, match=r"extend.pt2: it was made for other"):
        load(twin)


def rehash(folder: Path, name: str) -> None:
    """Let the manifest agree with a file that was changed."""
    data = json.loads((folder / "manifest.json").read_text())
    content = (folder / name).read_bytes()
    data["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(sealed(data)))


def test_what_cannot_be_exported_is_refused(llm: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(xkv_fx.UnsupportedModelError, match="LlamaForCausalLM"):
        xkv_fx.export(ready_models.model(), tmp_path / "engine")  # type: ignore[arg-type]
    with pytest.raises(xkv_fx.BackendError, match="choose one of aoti, pt2"):
        xkv_fx.export(llm, tmp_path / "engine", target="exe")
    with pytest.raises(xkv_fx.EngineError, match="exists"):
        xkv_fx.export(llm, folder)


def test_an_export_that_fails_leaves_nothing(llm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("xkv_fx.engines.trace.trace_program", interrupted)
    with pytest.raises(KeyboardInterrupt):
        xkv_fx.export(llm, tmp_path / "engine")
    assert not list(tmp_path.iterdir())


@dataclasses.dataclass(frozen=True)
class Branching:
    """A scorer that looks at its numbers."""

    paper = "none"
    looks_at_question = False
    reads_values = False
    measures_attention = False

    def __call__(self, prompt: Any) -> torch.Tensor:
        scores = prompt.ordinals.float()
        return -scores if bool((scores > 3).any()) else scores


def test_a_scorer_that_cannot_be_traced_is_named(llm: Any, tmp_path: Path) -> None:
    graphs = dataclasses.replace(llm.program.graphs, scorer=Branching(), _built={})
    program = type(llm.program)(graphs, "eager")
    branching = type(llm)(llm.config, llm.generation_config, llm.budgets, program)
    with pytest.raises(xkv_fx.BackendError, match="Branching"):
        xkv_fx.export(branching, tmp_path / "engine")
    assert not list(tmp_path.iterdir())


def test_a_portable_engine_is_loaded_by_those_who_trust_it(llm: Any, folder: Path, tmp_path: Path) -> None:
    path = folder
    if TARGET != "pt2":
        path = tmp_path / "engine"
        xkv_fx.export(llm, path, target="pt2")
    with zipfile.ZipFile(path / "decode.pt2") as archive:  # the graph, but no weights
        assert sum(member.file_size for member in archive.infolist() if "/data/" in member.filename) < 100
    with pytest.raises(xkv_fx.EngineError, match="trust=True"):
        xkv_fx.load(path)
    engine = xkv_fx.load(path, trust=True)
    ids, valid = padded([random_ids(1, 5), random_ids(1, 21, seed=1)], "left")
    expected = llm.generate(ids, attention_mask=valid, max_new_tokens=12, do_sample=False)
    assert torch.equal(engine.generate(ids, 12, attention_mask=valid), expected)
    assert Manifest.load(path).budgets == llm.budgets


@exhaustive
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_scorer_that_loops_over_the_queries(family: str, tmp_path: Path) -> None:
    budgets = Budgets((12, 16), Policy(scorer="h2o", eviction="scored", sinks=1))
    llm = ready_models.transform_again(budgets, rows=1, family=family)
    xkv_fx.export(llm, tmp_path / "engine", target="pt2")
    engine = xkv_fx.load(tmp_path / "engine", trust=True)
    for length in (5, 30, 300):  # of several blocks of queries
        ids = random_ids(1, length)
        expected = llm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert torch.equal(engine.generate(ids, 8), expected)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("pad_token_id", -1, "'pad_token' must be a whole number of at least 0"),
        ("eos_token_id", [5, -2], "end_"),
    ],
)
def test_what_load_would_refuse_is_refused_before_anything_is_compiled(
    llm: Any, name: str, value: Any, said: str, tmp_path: Path
) -> None:
    made = copy.copy(llm)
    made.generation_config = copy.deepcopy(llm.generation_config)
    setattr(made.generation_config, name, value)
    with pytest.raises(xkv_fx.EngineError, match=rf"{said}.*generation_config"):
        xkv_fx.export(made, tmp_path / "engine", target="aoti")
    assert not list(tmp_path.iterdir())


def test_tokens_are_drawn_as_by_the_transformed_model(llm: Any, engine: xkv_fx.Engine) -> None:
    ids = random_ids(2, 9)
    options: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9}
    drawn = engine.generate(ids, 6, **options, generator=torch.Generator().manual_seed(3))
    session = llm.new_session()
    first = token_chooser(**options, generator=(source := torch.Generator().manual_seed(3)))(
        session.feed(ids, None, None, False)[:, -1]
    )
    expected = llm.decode_steps(5, session, first[:, None], **options, generator=source)
    assert torch.equal(drawn[:, 9:], torch.cat((first[:, None], expected), 1))
    assert torch.equal(engine.generate(ids, 6, do_sample=True, top_p=1e-9), engine.generate(ids, 6))


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9}], ids=str)
def test_sampling_options_without_sampling_are_refused(engine: xkv_fx.Engine, options: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match="temperature, top_k and top_p are for sampling; give do_sample=True, too"):
        engine.generate(random_ids(2, 3), 2, **options)

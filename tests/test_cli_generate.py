"""`xkv-fx generate` and `xkv-fx chat`, run in process on a tiny model."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizer import ChatTokenizer
from ready_models import captured, model, remember_captures, remember_programs
from typer.testing import CliRunner

import xkv_fx
from xkv_fx import cli
from xkv_fx.cli import answers_file
from xkv_fx.errors import EngineError, FileFormatError, PromptError
from xkv_fx.hf import capture

RUN = CliRunner()
BUDGETS = xkv_fx.Budgets((12, 17))
LINES: list[Any] = [
    "hello there, you",
    {"prompt": "how are you", "max_new_tokens": 3, "id": "second"},
    {"prompt": "abc" * 200},
    {"messages": [{"role": "user", "content": "hi"}]},
    {"prompt": "draw", "do_sample": True, "temperature": 2.0},
    {"prompt": "stops", "stop": "zz", "id": 5},
    {"prompt": "bad @ letter"},
]


@pytest.fixture(autouse=True)
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> ChatTokenizer:
    remember_captures(monkeypatch)
    remember_programs(monkeypatch)
    known = ChatTokenizer()
    monkeypatch.setattr("xkv_fx.hf.models.load_model", lambda name: (model(), known))
    return known


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    BUDGETS.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in LINES) + "\n")
    return path


def invoke(*arguments: Any, given: str | None = None) -> Any:
    result = RUN.invoke(cli.app, [str(argument) for argument in arguments], input=given)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def generate(plan: Path, *arguments: Any, given: str | None = None) -> Any:
    result = invoke("generate", plan, "--backend", "eager", "--max-new-tokens", 6, *arguments, given=given)
    assert result.exit_code == 0, result.output
    return result


def alone(text: str, tokens: int = 6) -> str:
    """What the prompt is answered by the model itself under this plan."""
    llm = xkv_fx.transform(model(), BUDGETS, 2, backend="eager")
    ids = ChatTokenizer()(text)["input_ids"]
    (answer,) = llm.generate_many([ids], tokens, tokenizer=ChatTokenizer())
    assert answer.text is not None
    return answer.text


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_prompt(plan: Path, tmp_path: Path) -> None:
    found = json.loads(generate(plan, "--prompt", "hello", "--json").stdout)
    assert found["text"] == alone("hello")
    assert found["prompt_tokens"] == 5
    file = tmp_path / "prompt.txt"
    file.write_text("hello")
    assert json.loads(generate(plan, "--prompt-file", file, "--json").stdout) == found
    assert json.loads(generate(plan, "--prompt-file", "-", "--json", given="hello").stdout) == found
    chat = json.loads(generate(plan, "--prompt", "hello", "--chat", "--system", "be", "--json").stdout)
    assert chat["text"] == alone("s:be#\nu:hello#\na:")
    with pytest.raises(PromptError, match="more than the model's 400 positions"):
        generate(plan, "--prompt", "x" * 500)


def test_many_prompts_into_a_file(plan: Path, asked: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    result = generate(plan, "--prompts", asked, "--out", out, "--batch-size", 2, "--json")
    found = records(out)
    assert [record["index"] for record in found] == list(range(len(LINES)))
    assert found[0]["text"] == alone(LINES[0])
    assert found[1] == {
        "index": 1, "id": "second", "text": alone("how are you", 3), "reason": "length", "tokens": 3,
        "prompt_tokens": 11,
    }  # fmt: skip
    assert "more than the model's 400 positions" in found[2]["error"]
    assert found[3]["text"] == alone("u:hi#\na:")
    assert "cannot be tokenized" in found[6]["error"]
    counts = json.loads(result.stdout.splitlines()[-1])
    assert (counts["answers"], counts["failed"], counts["resumed"]) == (5, 2, 0)
    assert not out.with_name("answers.jsonl.parts").exists()
    shown = generate(plan, "--prompts", asked, "--batch-size", 2).stdout.splitlines()
    assert [json.loads(line) for line in shown if line.startswith("{")] == found, "in order, on standard output"
    piped = generate(plan, "--prompts", "-", "--batch-size", 2, given=asked.read_text()).stdout.splitlines()
    assert piped[-len(LINES) :] == shown[-len(LINES) :]
    with pytest.raises(FileExistsError, match="exists; remove it"):
        generate(plan, "--prompts", asked, "--out", out)


@pytest.mark.parametrize("stops_after", [0, 1, 4, 7])
@pytest.mark.parametrize("cut", [0, 9])
def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_file(
    stops_after: int, cut: int, plan: Path, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed behind some answers, perhaps in the middle of writing one."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    parts = out.with_name("out.jsonl.parts")
    options = ("--prompts", asked, "--batch-size", 2, "--sample", "--seed", 3)
    generate(plan, *options, "--out", whole)

    class Killed(Exception):
        pass

    def until_killed(self: Any, *given: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        add = answers_file.AnswersFile.add
        written: list[int] = []

        def adds(self: Any, index: int, record: Any) -> None:
            if len(written) == stops_after:
                raise Killed
            written.append(index)
            add(self, index, record)

        patch.setattr(answers_file.AnswersFile, "add", adds)
        patch.setattr(answers_file.AnswersFile, "finish", until_killed)
        with pytest.raises(Killed):
            generate(plan, *options, "--out", out)
    assert not out.exists()
    if cut:
        parts.write_text(parts.read_text() + '{"index": 3, "text": "x'[: cut + 5])
    result = generate(plan, *options, "--out", out, "--json")
    assert out.read_bytes() == whole.read_bytes()
    assert not parts.exists()
    assert json.loads(result.stdout.splitlines()[-1])["resumed"] == stops_after


def test_answers_to_something_else_are_not_taken(plan: Path, asked: Path, tmp_path: Path) -> None:
    out, parts = tmp_path / "out.jsonl", tmp_path / "out.jsonl.parts"
    for content in (
        '{"format": "xkv_fx.answers", "version": 1, "made_of": "x"}\n',
        "",
        "text\n",
        '{"a": 1}\n',
        "[" * 9999 + "\n",
    ):
        parts.write_text(content)
        with pytest.raises(FileFormatError, match="remove it, or choose another --out"):
            generate(plan, "--prompts", asked, "--out", out)
        assert parts.read_text() == content


def test_a_full_disk(plan: Path, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.jsonl"
    append, count = answers_file.AnswersFile._append, 0

    def full(self: Any, line: Any, path: Path) -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise self._explained(OSError(errno.ENOSPC, "No space left on device"))
        append(self, line, path)

    monkeypatch.setattr(answers_file.AnswersFile, "_append", full)
    with pytest.raises(
        OSError, match="disk is full; make room and give the same command again: it goes on behind the 2"
    ):
        generate(plan, "--prompts", asked, "--out", out)


def test_what_all_prompts_begin_with_is_fed_once(plan: Path, tmp_path: Path) -> None:
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(f'"the same words then {word}"\n' for word in ("one", "two", "three")))
    shown = generate(plan, "--prompts", asked, "--share-prefix").stdout.splitlines()
    assert len([line for line in shown if line.startswith("{")]) == 3
    asked.write_text('"a"\n"b"\n')
    with pytest.raises(PromptError, match="begin with different tokens; leave it out"):
        generate(plan, "--prompts", asked, "--share-prefix")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("text", "line 2: not valid JSON"),
        ("3", 'line 2: give a string, or an object with either "prompt" or "messages"'),
        ('{"prompt": "a", "messages": []}', "either"),
        ('{"prompt": 3}', "the prompt must be a string"),
        ('{"messages": []}', "messages must be a list"),
        ('{"messages": [{"role": "user"}]}', "messages must be a list"),
        ('{"prompt": "a", "tmperature": 3}', "unknown field 'tmperature'"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}', "request 2: the chat"),
        ("\x00\udc80", "not text in UTF-8"),
    ],
)
def test_lines_that_ask_nothing(line: str, message: str, plan: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'"fine"\n' + line.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises((FileFormatError, PromptError), match=message):
        generate(plan, "--prompts", path)


def test_options_that_do_not_go_together(plan: Path, asked: Path, tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    with pytest.raises(PromptError, match="either --prompt, --prompt-file or --prompts"):
        generate(plan, "--prompt", "a", "--prompts", asked)
    with pytest.raises(PromptError, match="--system is for chats; give --chat too"):
        generate(plan, "--prompt", "a", "--system", "b")
    with pytest.raises(EngineError, match="one prompt, greedily; leave --prompts, --sample out"):
        invoke("generate", "--engine", tmp_path, "--prompts", asked, "--sample")
    with pytest.raises(EngineError, match="leave --system out"):
        invoke("generate", "--engine", tmp_path, "--prompt", "a", "--system", "b")
    tokenizer.chat_template = None
    with pytest.raises(PromptError, match="no chat template"):
        generate(plan, "--prompt", "a", "--chat")


def test_no_more_rows_than_requests(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def remembered(source: Any, rows: int = 1, **_: Any) -> Any:
        seen.append(rows)
        return captured("llama", 2, rows)

    monkeypatch.setattr(capture, "capture", remembered)
    generate(plan, "--prompt", "a")
    assert seen[0] == 1


def test_chat(plan: Path) -> None:
    said = "hello\n\n/held\nwhat else is there\n/help\n/nonsense\n/forget\nhello\n/quit\nnever\n"
    options = ("--backend", "eager", "--max-new-tokens", 5, "--system", "be")
    result = invoke("chat", plan, *options, "--json", given=said)
    assert result.exit_code == 0, result.output
    turns = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(turns) == 4
    assert turns[0]["text"] == alone("s:be#\nu:hello#\na:", 5)
    assert turns[0] == turns[3]
    assert len(turns[1]["held"]) == turns[0]["conversation_tokens"] == len("s:be#\nu:hello#\na:") + 4
    assert turns[2]["forgotten"] > 0
    assert turns[2]["kv_bytes"] == BUDGETS.kv_bytes(model())
    shown = invoke("chat", plan, *options, given=said)
    assert turns[0]["text"] in shown.stdout
    assert "[-" in shown.stdout
    assert "forgotten; " in shown.stderr
    assert "there is no /nonsense" in shown.stderr


def test_a_chat_without_room_says_so_and_goes_on(plan: Path) -> None:
    said = f"hello\n{'x' * 400}\nhello\n"
    result = invoke("chat", plan, "--backend", "eager", "--max-new-tokens", 5, "--json", given=said)
    assert "positions" in result.stderr
    assert "/forget starts anew" in result.stderr
    assert len([line for line in result.stdout.splitlines() if line.startswith("{")]) == 2


def test_a_chat_without_template(plan: Path, tokenizer: ChatTokenizer) -> None:
    tokenizer.chat_template = None
    with pytest.raises(PromptError, match="no chat template"):
        invoke("chat", plan, given="hello\n")

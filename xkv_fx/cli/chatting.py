"""`chat`: a conversation in bounded memory."""

from __future__ import annotations

import itertools
import operator
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

import xkv_fx
from xkv_fx.cli.common import BACKEND_NAMES, Json, OverLimit, Plan, app, console, errors, show
from xkv_fx.cli.model_options import THE_MODEL, ModelOptions, transform, with_options
from xkv_fx.cli.sampling_options import SAMPLING, SamplingOptions
from xkv_fx.errors import CapacityError, PromptError
from xkv_fx.sizes import as_text

if TYPE_CHECKING:
    from xkv_fx.hf.chat import Conversation, Turn

HELP = "/held shows what is held of the conversation, /forget starts anew, /quit ends; Ctrl-C stops an answer"
BANDS = ((0.75, "bold"), (0.25, ""), (1e-9, "dim"), (-1.0, "dim strike"))
"""How a token is shown by the share of layers and heads that hold it, from the least share that each is for."""


@app.command()
@with_options(model=ModelOptions, sampling=SamplingOptions)
def chat(
    plan: Plan,
    system: Annotated[str | None, typer.Option(help="What is said before the conversation.")] = None,
    sampling: SamplingOptions = SAMPLING,
    model: ModelOptions = THE_MODEL,
    backend: Annotated[str, typer.Option(help=f"{BACKEND_NAMES}.")] = "inductor",
    over_limit: OverLimit = False,
    json_: Json = False,
) -> None:
    """Talk with a model in the memory that a plan gives, however long the conversation.

    One line of standard input is one turn. Shows what is held and what is forgotten; /help lists what else there is.
    With --json each turn is a line of JSON.
    """
    from xkv_fx.hf.chat import Conversation
    from xkv_fx.hf.chat_template import check_template
    from xkv_fx.runtime.choose_tokens import token_chooser

    budgets = xkv_fx.Budgets.load(plan)
    loaded, tokenizer = model.load()
    check_template(tokenizer)
    room = sampling.max_new_tokens
    llm = transform(loaded, budgets, backend=backend, max_new_tokens=room, over_limit=over_limit)
    import torch

    generator = torch.Generator(llm.device).manual_seed(sampling.seed)
    choose = token_chooser(sampling.sample, sampling.temperature, sampling.top_k, generator, sampling.top_p)
    conversation = Conversation(llm.new_session(), tokenizer, llm.end_tokens, choose, system)
    if sys.stdin.isatty():
        errors.print(f"{as_text(llm.kv_bytes)} of KV cache. {HELP}", highlight=False, style="dim")
    for line in _lines():
        if line in ("/quit", "/exit"):
            return
        if line.startswith("/"):
            _command(line, conversation, tokenizer, json_)
            continue
        try:
            _answer(conversation, line, sampling.max_new_tokens, json_)
        except (PromptError, CapacityError) as error:
            errors.print(f"{error}. /forget starts anew", style="red", markup=False, soft_wrap=True)


def _lines() -> Iterator[str]:
    """What the user says, line by line."""
    while True:
        try:
            line = console.input("[bold]>[/] ") if sys.stdin.isatty() else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            return
        if not sys.stdin.isatty() and not line:
            return
        if line.strip():
            yield line.strip()


def _command(line: str, conversation: Conversation, tokenizer: object, as_json: bool) -> None:
    if line == "/forget":
        conversation.forget()
    elif line == "/held":
        if as_json:
            show({"held": [round(float(share), 4) for share in conversation.held()]}, True)
        else:
            console.print(held_text(conversation, tokenizer), soft_wrap=True)
    else:
        errors.print(HELP if line == "/help" else f"there is no {line}; {HELP}", markup=False, highlight=False)


def _answer(conversation: Conversation, text: str, max_new_tokens: int, as_json: bool) -> None:
    with _stopped_by_interrupt() as stopped:
        part = (lambda new: None) if as_json else (lambda new: console.out(new, end="", highlight=False))
        turn = conversation.say(text, max_new_tokens, part, stopped)
    if as_json:
        show({"text": turn.text, "reason": turn.reason, **summary(conversation, turn)}, True)
        return
    console.print()
    errors.print(_status(conversation, turn), style="dim", highlight=False, soft_wrap=True)


def summary(conversation: Conversation, turn: Turn) -> dict[str, int]:
    """What is held of a conversation now, in tokens and bytes."""
    held = conversation.held()
    return {
        "tokens": turn.tokens,
        "conversation_tokens": len(held),
        "held_everywhere": int((held >= 1).sum()),
        "forgotten": int((held == 0).sum()),
        "kv_bytes": conversation.session.kv_bytes,
    }


def _status(conversation: Conversation, turn: Turn) -> str:
    found = summary(conversation, turn)
    total, whole, gone = found["conversation_tokens"], found["held_everywhere"], found["forgotten"]
    ended = {"end": "", "length": f"stopped after {turn.tokens} tokens (--max-new-tokens); ", "stopped": "stopped; "}
    return (
        f"{ended[turn.reason]}{total:,} tokens so far: {whole:,} held by all layers, {total - whole - gone:,} by some, "
        f"{gone:,} forgotten; {as_text(found['kv_bytes'])} of KV cache"
    )


def held_text(conversation: Conversation, tokenizer: object) -> Text:
    """The conversation, each part styled by how much of it is held; what is forgotten is in [-...-] on no terminal."""
    shown = Text()
    styles = [next(style for least, style in BANDS if share >= least) for share in conversation.held().tolist()]
    for style, group in itertools.groupby(zip(styles, conversation.ids, strict=False), key=operator.itemgetter(0)):
        part = tokenizer.decode([token for _, token in group])  # type: ignore[attr-defined]
        forgotten = style == BANDS[-1][1] and not console.is_terminal
        shown.append(f"[-{part}-]" if forgotten else part, style=style)
    return shown


@contextmanager
def _stopped_by_interrupt() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed, which here stops an answer between two tokens instead of raising in one of them."""
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)

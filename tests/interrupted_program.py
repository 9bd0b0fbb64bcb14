"""One long job on a tiny model, for `test_faults` to interrupt: `python interrupted_program.py JOB FOLDER`.

It prints `step N` whenever something has been finished, and `done` at the end.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tiny_models import llama, random_ids
from word_tokenizer import WordTokenizer

import xkv_fx
from xkv_fx import Budgets, Policy

PROMPTS = [random_ids(1, 60 + seed, seed) for seed in range(4)]
VOCABULARY = 500
REQUESTS = [
    {"prompt": " ".join(f"w{2 + (7 * word + request) % 290}" for word in range(20 + 9 * request)),
     "max_new_tokens": 4 + request, "do_sample": request % 2 == 1}
    for request in range(6)
]  # fmt: skip


def step(done: int, total: int) -> None:
    print("step", done, flush=True)
    time.sleep(0.3)  # for the signal to come before the next one is done


def profile(folder: Path) -> None:
    xkv_fx.profile(llama(), PROMPTS, progress=step).save(folder / "profile.safetensors")


def calibrate(folder: Path) -> None:
    policy = Policy(eviction="append")
    measured = xkv_fx.calibrate(llama(), PROMPTS, policy=policy, progress=step, resume=folder / "parts")
    measured.save(folder / "calibration.safetensors")


def export(folder: Path) -> None:
    llm = xkv_fx.transform(llama(), Budgets((12, 16)), backend="eager")
    step(1, 1)
    xkv_fx.export(llm, folder / "engine", target="pt2")


def evaluate(folder: Path) -> None:
    from xkv_fx.evaluation.quality.candidates import candidates_of_fractions
    from xkv_fx.evaluation.quality.evaluate import EvaluationSettings, evaluate
    from xkv_fx.files import write_json

    llm: Any = xkv_fx.transform(llama(vocab_size=VOCABULARY), Budgets.full(2, 300), backend="eager", check=False)
    plans = candidates_of_fractions(llm.layers, 160, (0.25, 0.5))
    settings = EvaluationSettings(("needle_single", "needle_multi_key"), length=160, count=1)
    found = evaluate(None, WordTokenizer(VOCABULARY), plans, settings, resume=folder / "parts", progress=step, llm=llm)
    write_json(folder / "result.json", found.to_dict())


def fit(folder: Path) -> None:
    options: Any = {"fraction": "25%", "continuation": 8, "multiple": 1, "scorers": ("snapkv", "key_diff")}
    (folder / "parts").mkdir(exist_ok=True)
    found = xkv_fx.fit(
        llama(), PROMPTS, max_new_tokens=8, resume=folder / "parts",
        found=lambda plan, how: step(0, 0), progress=lambda what, done, total: step(done, total), **options,
    )  # fmt: skip
    found.budgets.save(folder / "plan.json")


def answers(folder: Path) -> None:
    from saved_models import save_model

    from xkv_fx.cli import answering, app
    from xkv_fx.cli.answers_file import AnswersFile

    class Told(AnswersFile):
        def add(self, index: int, record: Any) -> None:
            super().add(index, record)
            step(len(self.done), len(REQUESTS))

    inputs = folder / "inputs"
    if not inputs.exists():
        save_model(inputs / "model")
        Budgets((12, 16)).save(inputs / "plan.json")
        (inputs / "asked.jsonl").write_text("".join(f"{json.dumps(request)}\n" for request in REQUESTS))
    answering.AnswersFile = Told  # type: ignore[misc]
    app(
        ["generate", str(inputs / "plan.json"), "--model", str(inputs / "model"), "--backend", "eager",
         "--batch-size", "2", "--prompts", str(inputs / "asked.jsonl"), "--out", str(folder / "answers.jsonl")],
        standalone_mode=False,
    )  # fmt: skip


def memory(folder: Path) -> None:
    """A plan of more bytes than the process may have."""
    import resource

    llm = xkv_fx.transform(llama(), Budgets((2_000_000_000, 16)), backend="eager", check=False)
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    try:
        llm.new_session()
    except xkv_fx.BudgetError as error:
        print(error)


def main() -> None:
    torch.set_num_threads(1)
    jobs = {each.__name__: each for each in (profile, calibrate, export, evaluate, fit, answers, memory)}
    jobs[sys.argv[1]](Path(sys.argv[2]))
    print("done", flush=True)


if __name__ == "__main__":
    main()

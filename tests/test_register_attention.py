"""transformers knows the attention "xkv" whichever of the two is imported first, and nothing else of it is changed."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import importlib.util, sys, transformers, xkv_fx
assert importlib.util.find_spec("transformers.modeling_utils") is not None, "who only looks for it does not load it"
assert "transformers.modeling_utils" not in sys.modules, "its models are loaded when the first one is asked for"
from transformers import LlamaForCausalLM
import transformers.modeling_utils as models, transformers.masking_utils as masks
print("xkv" in models.ALL_ATTENTION_FUNCTIONS, "xkv" in masks.ALL_MASK_ATTENTION_FUNCTIONS)
print(type(models.__loader__).__name__, models.__spec__.loader is models.__loader__)
print([finder for finder in sys.meta_path if "xkv" in type(finder).__module__])
"""


def test_it_is_known_as_soon_as_models_are_loaded() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == ["True True", "SourceFileLoader True", "[]"]


def test_it_is_known_at_once_where_they_are_loaded_already() -> None:
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    from xkv_fx.register_attention import register_attention

    finders = list(sys.meta_path)
    register_attention()
    assert sys.meta_path == finders
    assert "xkv" in AttentionInterface()
    assert "xkv" in AttentionMaskInterface()

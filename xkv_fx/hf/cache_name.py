"""The name under which transformers passes the cache: `past_key_values` up to 5.23, `cache` since.

`generate`, forward's arguments and the fields of outputs were renamed together. Newer versions take the old name from
users too, but drop it without an error where both are given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import transformers
from packaging.version import Version
from transformers.modeling_outputs import CausalLMOutputWithPast

from xkv_fx.errors import SessionError

CACHE_NAMES = ("past_key_values", "cache", "cache_params")
"""What any supported version calls it; the last one is that of Mamba models before 5.24."""
CACHE_NAME = next(field.name for field in dataclasses.fields(CausalLMOutputWithPast) if field.name in CACHE_NAMES)
"""What the installed version calls it."""
TRANSFORMERS = Version(transformers.__version__)
CHUNKS_HOLD_NEW_TOKENS = TRANSFORMERS.release >= (5, 21)
"""With `prefill_chunk_size`, older versions feed the whole conversation again even if the cache holds part of it."""


def cache_given(arguments: Mapping[str, Any]) -> Any:
    """The cache among a call's arguments, under whichever name; None if there is none.

    Raises:
        SessionError: two names hold different ones.
    """
    given = {name: arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None}
    caches = list(given.values())
    if any(cache is not caches[0] for cache in caches):
        raise SessionError(f"{' and '.join(given)} are two names for one argument, and got different caches; pass one")
    return caches[0] if caches else None

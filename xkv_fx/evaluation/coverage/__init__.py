"""Which causal language models are taken."""

import xkv_fx.hf  # noqa: F401  (imports transformers quietly, before a module here does)

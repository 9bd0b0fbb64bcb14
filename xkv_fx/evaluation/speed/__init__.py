"""How fast it is: benches against other caches and other engines."""

import xkv_fx.hf  # noqa: F401  (imports transformers quietly, before a module here does)

"""Everything that knows transformers: capture, generation, and the models that a name stands for."""

from xkv_fx.hf.quiet_import import import_quietly

import_quietly()

"""Making the name "xkv" known to transformers, whichever of the two packages is imported first.

`model.set_attn_implementation("xkv")` looks the name up in a table of transformers, which has no entry points for
plugins, and `import xkv_fx` must not load transformers. So the import system is asked to run one import of ours after
transformers' own `modeling_utils`, where that table is made. Nothing of transformers is changed: one name is added to
two of its tables through their public `register`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

AWAITED = "transformers.modeling_utils"
ENTRY = "xkv_fx.hf.attention_entry"


def register_attention() -> None:
    """Import our entry now if transformers' models are loaded, otherwise as soon as they have been."""
    if AWAITED in sys.modules:
        importlib.import_module(ENTRY)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the awaited module in the usual way, and lets `_Loader` load it; until then it may be asked again."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AWAITED:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    """Loads a module with its own loader, leaves no trace of itself or its finder, and imports our entry."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        importlib.import_module(ENTRY)

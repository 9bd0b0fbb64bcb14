"""xkv_fx: a PyTorch compile-time pass that gives each layer of a language model its own KV cache capacity.

A public name is loaded when it is first used: `import xkv_fx` alone loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import xkv_fx.budgets  # noqa: F401  (so that `xkv_fx.budgets.Provenance` is there at once)
from xkv_fx.register_attention import register_attention as _register_attention

if TYPE_CHECKING:
    from xkv_fx.api import calibrate, export, fit, fit_quality, load, profile, solve, transform, verify
    from xkv_fx.compile_backend.backend import compiled_session
    from xkv_fx.compile_backend.cache import Cache
    from xkv_fx.engines.engine import Engine
    from xkv_fx.errors import (
        BackendError,
        BudgetError,
        CapacityError,
        EngineError,
        FileFormatError,
        MissingFileError,
        ModelMismatchError,
        PassError,
        PromptError,
        SessionError,
        UnsupportedModelError,
        XkvError,
    )
    from xkv_fx.layers import LayerSpec
    from xkv_fx.planning.data.calibration_data import Calibration
    from xkv_fx.planning.data.profile_data import Profile
    from xkv_fx.planning.fit.data import Fit
    from xkv_fx.planning.measure.verify import Verification
    from xkv_fx.policy import Policy
    from xkv_fx.public_budgets import Budgets
    from xkv_fx.runtime.many.request import Answer, Request

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "BackendError",
    "BudgetError",
    "Budgets",
    "Cache",
    "Calibration",
    "CapacityError",
    "Engine",
    "EngineError",
    "FileFormatError",
    "Fit",
    "LayerSpec",
    "MissingFileError",
    "ModelMismatchError",
    "PassError",
    "Policy",
    "Profile",
    "PromptError",
    "Request",
    "SessionError",
    "UnsupportedModelError",
    "Verification",
    "XkvError",
    "__version__",
    "calibrate",
    "compiled_session",
    "export",
    "fit",
    "fit_quality",
    "load",
    "profile",
    "solve",
    "transform",
    "verify",
]

_HOMES = {
    "Answer": "xkv_fx.runtime.many.request",
    "BackendError": "xkv_fx.errors",
    "BudgetError": "xkv_fx.errors",
    "Budgets": "xkv_fx.public_budgets",
    "Cache": "xkv_fx.compile_backend.cache",
    "Calibration": "xkv_fx.planning.data.calibration_data",
    "CapacityError": "xkv_fx.errors",
    "Engine": "xkv_fx.engines.engine",
    "EngineError": "xkv_fx.errors",
    "FileFormatError": "xkv_fx.errors",
    "Fit": "xkv_fx.planning.fit.data",
    "LayerSpec": "xkv_fx.layers",
    "MissingFileError": "xkv_fx.errors",
    "ModelMismatchError": "xkv_fx.errors",
    "PassError": "xkv_fx.errors",
    "Policy": "xkv_fx.policy",
    "Profile": "xkv_fx.planning.data.profile_data",
    "PromptError": "xkv_fx.errors",
    "Request": "xkv_fx.runtime.many.request",
    "SessionError": "xkv_fx.errors",
    "UnsupportedModelError": "xkv_fx.errors",
    "Verification": "xkv_fx.planning.measure.verify",
    "XkvError": "xkv_fx.errors",
    "calibrate": "xkv_fx.api",
    "compiled_session": "xkv_fx.compile_backend.backend",
    "export": "xkv_fx.api",
    "fit": "xkv_fx.api",
    "fit_quality": "xkv_fx.api",
    "load": "xkv_fx.api",
    "profile": "xkv_fx.api",
    "solve": "xkv_fx.api",
    "transform": "xkv_fx.api",
    "verify": "xkv_fx.api",
}

if not TYPE_CHECKING:  # a type checker that sees __getattr__ takes every misspelt name for a real one

    def __getattr__(name: str) -> Any:
        home = _HOMES.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(home), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


_register_attention()

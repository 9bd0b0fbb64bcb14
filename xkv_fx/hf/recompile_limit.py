"""What to do once Dynamo stops compiling: it has one limit for the kinds of calls of all models of a class."""

from __future__ import annotations

import inspect

import torch

HAS_ISOLATION = "isolate_recompiles" in inspect.signature(torch.compile).parameters
"""Whether this torch can count them for each compiled model on its own (from 2.13 on)."""

RAISE_LIMIT = (
    "It compiles at most torch._dynamo.config.recompile_limit kinds of calls for a class of models, and each plan "
    "takes two; "
    + ("compile each model with isolate_recompiles=True, " if HAS_ISOLATION else "")
    + "raise that limit, or call torch._dynamo.reset() to start anew"
)

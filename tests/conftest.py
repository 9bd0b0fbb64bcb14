"""Settings for every test: fixed seeds, no network, and one thread a worker."""

from __future__ import annotations

import gc
import os
import random

import fuzzing
import hypothesis
import numpy as np
import pytest
import torch

SEED = 0

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported, which happens after this file

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores among themselves
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the programs that tests start
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# What is imported stays, and a test makes little garbage: looking for it as often as Python does takes 7 % of the time.
gc.freeze()
gc.set_threshold(20_000, 20, 20)

# Examples are the same in every run, but for those of `make fuzz`; and a slow machine is no failure.
FUZZING = fuzzing.TIMES > 1
hypothesis.settings.register_profile(
    "xkv_fx",
    deadline=None,
    derandomize=not FUZZING,
    database=None,
    max_examples=100 * fuzzing.TIMES,
    suppress_health_check=[hypothesis.HealthCheck.too_slow] if FUZZING else [],
)
hypothesis.settings.load_profile("xkv_fx")


# Files that share what takes long to make. They come first, since a worker takes the last ones of another's tests.
MADE_ONCE = ("test_smollm2.py", "test_engine.py", "test_tensorrt_engine.py", "test_bench.py", "test_evaluate.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in MADE_ONCE)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds every global random generator before each test, and is the seed."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.default_generator.manual_seed(SEED)
    if torch.cuda.is_initialized():  # before, torch.manual_seed would only note it down, slowly, for later
        torch.cuda.manual_seed_all(SEED)
    return SEED

"""What every test shares: fixed seeds, a cache folder of its own, and GPU tests that need a GPU."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")
# No test is saved, or broken, by a kernel that an earlier version left behind.
_CACHE = tempfile.TemporaryDirectory(prefix="einscade-tests-")
os.environ["EINSCADE_CACHE_DIR"] = _CACHE.name
# How long an example takes depends on what else the machine does.
settings.register_profile("untimed", settings.default, deadline=None)
settings.load_profile("untimed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # No worker is left alone with a long test at the end.
    items.sort(key=lambda item: ("slow" not in item.keywords, "long" not in item.keywords))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    # What is imported stays: going through it again with every collection takes a part of the suite's time that shows.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """No graph compiled by an earlier test is reused, and Dynamo's counters start at zero."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()

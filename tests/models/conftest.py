"""The pretrained decoder, loaded once: reading its weights takes longer than most tests."""

from __future__ import annotations

from typing import Any

import pytest

from examples import pretrained


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """SmolLM2-135M-Instruct with eager attention. Tests leave it as it is."""
    return pretrained.smollm2("eager")


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Any:
    return pretrained.smollm2_tokenizer()

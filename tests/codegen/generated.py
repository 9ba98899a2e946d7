"""Importing generated text, which Triton reads back from its file."""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

from einscade.codegen.source import Source

_FOLDER = tempfile.TemporaryDirectory(prefix="einscade-generated-")


@functools.cache
def module(source: Source) -> ModuleType:
    """The source's text as a module."""
    path = Path(_FOLDER.name) / f"generated_{abs(hash(source))}.py"
    path.write_text(source.text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def run_poisoned(source: Source, inputs: Mapping[str, Tensor], sizes: Mapping[str, int]) -> tuple[Tensor, ...]:
    """What the module computes where all that it allocates is NaN, and integers large: an element that is not written
    shows."""
    empty = torch.empty

    def poisoned(*shape: object, **options: object) -> Tensor:
        made = empty(*shape, **options)  # type: ignore[call-overload]
        return made.fill_(float("nan") if made.is_floating_point() else 2**20)

    with mock.patch.object(torch, "empty", poisoned):
        return module(source).run(*inputs.values(), **sizes)

"""Importing generated text, which Triton reads back from its file."""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from pathlib import Path
from types import ModuleType

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

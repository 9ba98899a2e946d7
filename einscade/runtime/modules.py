"""Generated text as running Python: importable, visible in tracebacks and debuggers, written nowhere."""

from __future__ import annotations

import functools
import hashlib
import linecache
import types
from collections.abc import Callable
from typing import Any

from einscade.codegen.source import Source

__all__ = ["load"]


@functools.lru_cache(maxsize=512)
def load(source: Source, name: str) -> Callable[..., Any]:
    """The entry function of a module with this text. Triton and tracebacks read the text through `linecache`."""
    digest = hashlib.sha256(source.text.encode()).hexdigest()[:12]
    filename = f"<einscade {name} {source.language} {digest}>"
    module = types.ModuleType(f"einscade_{name}_{digest}")
    module.__file__ = filename
    linecache.cache[filename] = (len(source.text), None, source.text.splitlines(keepends=True), filename)
    exec(compile(source.text, filename, "exec"), module.__dict__)
    return getattr(module, source.entry)

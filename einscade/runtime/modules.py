"""Generated text as running Python: importable, visible in tracebacks and debuggers, written nowhere."""

from __future__ import annotations

import functools
import hashlib
import linecache
import types
from collections.abc import Callable
from typing import Any

from einscade.codegen.source import Source
from einscade.ir.cascade import Cascade
from einscade.ir.text import print_cascade
from einscade.runtime import launch
from einscade.runtime.program import DTYPES

__all__ = ["interpreted", "load"]


@functools.lru_cache(maxsize=512)
def load(source: Source, name: str) -> Callable[..., Any]:
    """The entry function of a module with this text; `launch` launches its kernels. Triton and tracebacks read the text
    through `linecache`."""
    digest = hashlib.sha256(source.text.encode()).hexdigest()[:12]
    filename = f"<einscade {name} {source.language} {digest}>"
    module = types.ModuleType(f"einscade_{name}_{digest}")
    module.__file__ = filename
    linecache.cache[filename] = (len(source.text), None, source.text.splitlines(keepends=True), filename)
    exec(compile(source.text, filename, "exec"), module.__dict__)
    if source.language == "triton":
        launch.install(module)
    return getattr(module, source.entry)


def interpreted(cascade: Cascade) -> Source:
    """A module that runs the reference interpreter on the cascade: slow, in float64, and there for every cascade."""
    inputs, symbols = [t.name for t in cascade.inputs], list(cascade.symbols)
    signature = ", ".join(f"tensor_{i}" for i in range(len(inputs))) + (", *, " + ", ".join(symbols) if symbols else "")
    tensors = ", ".join(f"{name!r}: tensor_{i}" for i, name in enumerate(inputs))
    sizes = ", ".join(f"{name!r}: {name}" for name in symbols)
    results = ", ".join(f"results[{name!r}].to({DTYPES[cascade.tensors[name].dtype]})" for name in cascade.outputs)
    text = (
        f'"""{cascade.name}: run by the reference interpreter"""\n\n'
        "import torch\n\nfrom einscade.ir.interpret import interpret\nfrom einscade.ir.text import parse_cascade\n\n"
        f'CASCADE = parse_cascade("""\n{print_cascade(cascade)}\n""")\n\n\n'
        f"def run({signature}) -> tuple[torch.Tensor, ...]:\n"
        f"    results = interpret(CASCADE, {{{tensors}}}, {{{sizes}}})\n"
        f"    return ({results},)\n"
    )
    return Source("torch", text)
